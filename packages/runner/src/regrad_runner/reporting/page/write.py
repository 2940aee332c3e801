"""The page itself: one file with its figures, styles and script inside, beside it the figures and their numbers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regrad_runner.files import make_folder, write_whole
from regrad_runner.reporting.page import content, curves, rows
from regrad_runner.reporting.page.drawing import draw, height_without_legend
from regrad_runner.reporting.page.marks import Drawing, write_marks
from regrad_runner.reporting.page.repeat import command_to_repeat
from regrad_runner.reporting.page.source import Source, read_source
from regrad_runner.reporting.page.svg import as_file, as_part, swatch
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure

FILE = "report.html"
LOADER = PackageLoader("regrad_runner.reporting.page")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: For links to it.
        title: Its heading.
        text: What stands above its figures.
        figures: Title, caption and picture of each.
        legend: What each curve is.
        tables: Below the figures.
    """

    name: str
    title: str
    text: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    legend: list[dict[str, Any]] = field(default_factory=list)
    tables: list[content.Table] = field(default_factory=list)


def write_page(folder: ResultsFolder, measure: Measure, summaries: list[ArmSummary]) -> list[Path]:
    """Write `report.html`, `figures.csv` and the figures as SVG files into the folder of a comparison.

    Args:
        folder: Of the comparison.
        measure: What was compared.
        summaries: One per arm.

    Returns:
        The files, the page first.
    """
    source = read_source(folder, measure, summaries)
    groups = {
        "differences": rows.difference_rows(source),
        "training": curves.training_curves(source),
        "target": rows.target_rows(source),
        "overhead": rows.overhead_rows(source),
        "effects": curves.effect_curves(source),
        "quality": [*rows.quality_rows(source), *curves.quality_curve(source)],
    }
    pictures = {
        name: [_picture(folder.path, drawing) for drawing in group]
        for name, group in groups.items()
    }
    legends = {name: _legend(group) for name, group in groups.items()}
    text = _render(source, _sections(source, pictures, legends))
    write_whole(folder.path / FILE, text)
    every = [drawing for group in groups.values() for drawing in group]
    files = [folder.path / "figures" / f"{drawing.name}.svg" for drawing in every]
    return [folder.path / FILE, write_marks(folder.path, every), *files]


def _sections(source: Source, pictures: dict[str, Any], legends: dict[str, Any]) -> list[Section]:
    """Return what comes between the verdicts and what was run, in the order in which it is asked for."""

    def section(name: str, title: str, text: str = "", *tables: content.Table | None) -> Section:
        told = [table for table in tables if table is not None]
        return Section(
            name=name, title=title, text=text, figures=pictures[name], legend=legends[name], tables=told
        )  # fmt: skip

    sections = [
        section("differences", "Table", "", content.comparison_table(source)),
        section(
            "training",
            f"{source.measure.name.removeprefix('test ').capitalize()} and loss",
            f"{curves.over_seeds(source)} {curves.LATE}",
        ),
        section("target", "Steps to the target", "For information: no verdict rests on them."),
        section(
            "overhead",
            "Overhead",
            "Time per step, evaluations and the first steps left out; no verdict rests on it.",
        ),
        section(
            "effects",
            "Effect over training",
            "What each correction changed, as its meter saw it: relative change is the size of the change ÷ the size "
            "of what was changed, the cosine is that of before and after, the trigger rate is the share of steps with "
            "any change. Measured are the first 20 steps, those after a warm-up, and every 50th. "
            f"{curves.over_seeds(source) if source.effects else ''}",
            content.effects_table(source),
        ),
        section(
            "quality",
            "Gradient quality",
            "Gradients of single steps against the gradient of many samples at the same weights: a diagnostic, no "
            "verdict reads it.",
            content.quality_table(source),
        ),
    ]
    return [part for part in sections if part.figures or part.tables]


def _picture(path: Path, drawing: Drawing) -> dict[str, Any]:
    """Write a figure as a file that stands alone and return it as a part of the page."""
    make_folder(path, "figures")
    figure = draw(drawing)
    text, height = as_file(figure, title=drawing.title), height_without_legend(figure)
    write_whole(path / "figures" / f"{drawing.name}.svg", text)
    part = as_part(
        text, name=drawing.name, title=drawing.title, alternative=drawing.alternative, height=height
    )
    # The text in it was escaped by the writer of XML; nothing else comes from outside.
    return {
        "title": drawing.title,
        "caption": drawing.caption,
        "svg": Markup(part),  # noqa: S704
        "kind": drawing.kind,
    }


def _legend(drawings: Sequence[Drawing]) -> list[dict[str, Any]]:
    styles = {
        series: style for d in drawings if d.kind == "curves" for series, style in d.styles.items()
    }
    return [
        {"name": series, "control": style.control, **swatch(style)}
        for series, style in styles.items()
    ]


def _render(source: Source, sections: list[Section]) -> str:
    environment = Environment(
        loader=LOADER,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_own(environment, name) for name in ("report.css", "report.js"))
    tables = (
        content.corrections_table(source),
        content.controls_table(source),
        content.rates_table(source),
        content.settings_table(source),
        content.machines_table(source),
    )
    return environment.get_template("report.html").render(
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=version("regrad-runner"),
        workload=str(source.about.get("workload", "")),
        brief=content.in_brief(source),
        verdicts=content.verdicts(source),
        missing=content.missing(source),
        sections=sections,
        run_tables=[table for table in tables if table is not None],
        command=command_to_repeat(source.settings, processes=int(source.about.get("processes", 1))),
    )


def _own(environment: Environment, name: str) -> str:
    """Return a file of this package as it is."""
    return LOADER.get_source(environment, name)[0]


def _hash(text: str) -> str:
    """Return what a policy allows a text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
