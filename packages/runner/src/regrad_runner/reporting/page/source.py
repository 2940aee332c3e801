"""What the page is made from: everything that a comparison's folder holds, read once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrad_runner.diagnostics.effects import Effect, kept_effects
from regrad_runner.diagnostics.gradient_quality import Quality, kept_qualities
from regrad_runner.reporting.styles import Style, arm_styles
from regrad_runner.results.about import read_about
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.receipts import read_receipt
from regrad_runner.settings.loading import read_settings
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure


@dataclass(frozen=True, kw_only=True)
class Source:
    """A comparison, ready to be shown.

    Attributes:
        folder: Its runs and curves.
        measure: What was compared.
        summaries: One per arm.
        effects: Effects over training; none in folders that do not hold them.
        qualities: Probes of gradient quality, if any.
        about: What the folder says about itself.
        settings: Its resolved settings; none where the file is missing.
        receipts: One per arm that has any: the first seed's.
    """

    folder: ResultsFolder
    measure: Measure
    summaries: list[ArmSummary]
    effects: list[Effect]
    qualities: list[Quality]
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    receipts: Mapping[str, Mapping[str, Any]]

    @property
    def styles(self) -> dict[str, Style]:
        """How each arm looks."""
        return arm_styles(self.summaries)

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with."""
        return next((s.arm for s in self.summaries if s.verdict == "baseline"), "none")

    @property
    def seeds(self) -> int:
        """The most seeds that an arm has."""
        return max((summary.seeds for summary in self.summaries), default=0)


def read_source(folder: ResultsFolder, measure: Measure, summaries: list[ArmSummary]) -> Source:
    """Return everything that the folder of a comparison holds."""
    config = folder.path / "config.yaml"
    settings = read_settings(config) if os.path.lexists(config) else {}
    receipts = {}
    for result in folder.results:
        path = folder.receipt_file(result.arm, result.seed)
        if result.arm not in receipts and os.path.lexists(path):
            receipts[result.arm] = read_receipt(path)
    return Source(
        folder=folder,
        measure=measure,
        summaries=summaries,
        effects=kept_effects(folder),
        qualities=kept_qualities(folder),
        about=read_about(folder.path),
        settings=settings,
        receipts=receipts,
    )
