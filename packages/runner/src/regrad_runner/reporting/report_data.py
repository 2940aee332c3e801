"""What a report is made from: everything that a comparison's folder holds, read once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrad_runner.diagnostics.effects import Effect, kept_effects
from regrad_runner.diagnostics.exits import ExitOutcome, kept_exits
from regrad_runner.diagnostics.gradient_quality import Quality, kept_qualities
from regrad_runner.diagnostics.step_times import StepTime, kept_step_times
from regrad_runner.reporting.styles import Style, arm_styles
from regrad_runner.reporting.summaries import baseline_of, target_of
from regrad_runner.results.about import read_about
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.receipts import read_receipt
from regrad_runner.settings.loading import read_settings
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A comparison, ready to be shown.

    Attributes:
        folder: Its runs and curves.
        measure: What was compared.
        summaries: One per arm.
        effects: Effects over training; none in folders that do not hold them.
        qualities: Probes of gradient quality, if any.
        about: What the folder says about itself.
        settings: Its resolved settings; none if the file is missing.
        receipts: One per arm that has any: the first seed's.
        step_times: Time per step by arm, as far as it was measured.
        exits: What the exits of models with several are worth, if there are any.
    """

    folder: ResultsFolder
    measure: Measure
    summaries: list[ArmSummary]
    effects: list[Effect]
    qualities: list[Quality]
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    receipts: Mapping[str, Mapping[str, Any]]
    step_times: Mapping[str, StepTime] = field(default_factory=dict)
    exits: list[ExitOutcome] = field(default_factory=list)

    @property
    def styles(self) -> dict[str, Style]:
        """How each arm looks."""
        return arm_styles(self.summaries)

    @property
    def baseline(self) -> str | None:
        """Name of the arm that the others are compared with; None if it was not run."""
        return baseline_of(self.summaries)

    @property
    def target(self) -> float | None:
        """What steps are counted to; None for nothing."""
        return target_of(self.summaries)

    @property
    def seeds(self) -> int:
        """The most seeds that an arm has."""
        return max((summary.seeds for summary in self.summaries), default=0)

    def usable_runs(self, arm: str | None) -> list[RunRow]:
        """Return the runs of an arm that ended with a number, by seed."""
        rows = [result.as_run_row() for result in self.folder.results if result.arm == arm]
        return sorted((row for row in rows if row.usable), key=lambda row: row.seed)


def read_report_data(
    folder: ResultsFolder, measure: Measure, summaries: list[ArmSummary]
) -> ReportData:
    """Return everything that the folder of a comparison holds."""
    return ReportData(
        folder=folder,
        measure=measure,
        summaries=summaries,
        effects=kept_effects(folder),
        qualities=kept_qualities(folder),
        step_times=kept_step_times(folder.path),
        exits=kept_exits(folder),
        about=read_about(folder.path),
        settings=_settings(folder),
        receipts=_first_receipts(folder),
    )


def _settings(folder: ResultsFolder) -> Mapping[str, Any]:
    config = folder.path / "config.yaml"
    if not os.path.lexists(config):
        return {}
    return read_settings(config)


def _first_receipts(folder: ResultsFolder) -> dict[str, Mapping[str, Any]]:
    """Return the first receipt of each arm that has any."""
    receipts: dict[str, Mapping[str, Any]] = {}
    for result in folder.results:
        path = folder.receipt_file(result.arm, result.seed)
        if result.arm not in receipts and os.path.lexists(path):
            receipts[result.arm] = read_receipt(path)
    return receipts
