"""The page itself, and beside it its figures as SVG files and their numbers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regrad_runner.files import make_folder, write_whole
from regrad_runner.reporting.figures import curves, exits, rows
from regrad_runner.reporting.figures.drawing import draw_plain
from regrad_runner.reporting.figures.families import families, in_families
from regrad_runner.reporting.figures.marks import Drawing, write_marks
from regrad_runner.reporting.figures.svg import as_svg
from regrad_runner.reporting.page import content
from regrad_runner.reporting.page.exits_table import exits_table
from regrad_runner.reporting.page.headline import headline, rest
from regrad_runner.reporting.page.plots import look_of, plot_of, small_multiples
from regrad_runner.reporting.page.repeat import command_to_repeat
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.styles import Style

PAGE_FILE = "report.html"
FIGURES_FOLDER = "figures"
TEMPLATES = PackageLoader("regrad_runner.reporting.page")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: For links to it.
        title: Its heading.
        text: What stands above its figures.
        drawings: Its figures.
        folded_drawings: Those of them that are shown only on request.
        families: Arms whose curves of the first figure are shown once more, a family at a time.
        baseline: The arm that stands in each of these.
        tables: Below the figures.
        is_folded: Whether all of it is shown only on request.
    """

    name: str
    title: str
    text: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    folded_drawings: list[Drawing] = field(default_factory=list)
    families: list[list[str]] = field(default_factory=list)
    baseline: str | None = None
    tables: list[content.PageTable] = field(default_factory=list)
    is_folded: bool = True

    @property
    def all_drawings(self) -> list[Drawing]:
        """Its figures, those that are folded too."""
        return [*self.drawings, *self.folded_drawings]

    @property
    def styles(self) -> dict[str, Style]:
        """How each curve of its figures looks."""
        found: dict[str, Style] = {}
        for drawing in self.all_drawings:
            if drawing.kind == "curves":
                found.update(drawing.styles)
        return found


def write_page(data: ReportData) -> list[Path]:
    """Write `report.html`, `figures.csv` and the figures as SVG files into a comparison's folder.

    Args:
        data: The comparison.

    Returns:
        The files, the page first.
    """
    sections = _sections(data)
    drawings = list(chain.from_iterable(section.all_drawings for section in sections))
    files = [_write_svg(data.folder.path, drawing) for drawing in drawings]
    page = data.folder.path / PAGE_FILE
    write_whole(page, _render(data, sections))
    marks = write_marks(data.folder.path, drawings)
    return [page, marks, *files]


def _title_of_training(data: ReportData) -> str:
    """Return the heading over the curves: a script of the user's own tells its measure alone."""
    title = data.measure.name.removeprefix("test ").capitalize()
    if "script" in data.settings:
        return title
    return f"{title} and loss"


def _sections(data: ReportData) -> list[Section]:
    """Return the figures and their tables, in the order of the questions."""
    curves_of_measure = curves.measure_curves(data)
    further_curves = [
        drawing for drawing in curves.training_curves(data) if drawing.name != "measure-steps"
    ]
    sections = [
        Section(
            name="differences",
            title="Difference from the baseline",
            drawings=rows.difference_rows(data),
            is_folded=False,
        ),
        Section(
            name="numbers",
            title="Numbers",
            tables=[content.arms_table(data)],
            is_folded=False,
        ),
        Section(
            name="training",
            title=_title_of_training(data),
            text=curves.training_caption(data),
            drawings=curves_of_measure,
            folded_drawings=further_curves,
            families=families(data.summaries),
            baseline=data.baseline,
            is_folded=False,
        ),
        Section(
            name="exits",
            title="Exits",
            text=(
                "What answers taken early are worth on the test images, against what they cost; "
                "no verdict rests on it."
            ),
            drawings=exits.exit_curves(data),
            tables=_present(exits_table(data)),
            is_folded=False,
        ),
        Section(
            name="target",
            title="Steps to the target",
            text="For information: no verdict rests on them.",
            drawings=rows.target_rows(data),
        ),
        Section(
            name="overhead",
            title="Overhead",
            text="Time per step, measured at the end of the comparison; no verdict rests on it.",
            drawings=rows.overhead_rows(data),
        ),
        Section(
            name="effects",
            title="Effect over training",
            text=_about_effects(data),
            drawings=curves.effect_curves(data),
            tables=_present(content.effects_table(data)),
        ),
        Section(
            name="quality",
            title="Gradient quality",
            text=(
                "Gradients of single steps against the gradient of many samples at the same "
                "weights: a diagnostic, no verdict rests on it."
            ),
            drawings=[*rows.quality_rows(data), *curves.quality_curve(data)],
            tables=_present(content.quality_table(data)),
        ),
    ]
    return [section for section in sections if section.all_drawings or section.tables]


def _about_effects(data: ReportData) -> str:
    text = (
        "What each correction changed, as the effect meter measured it in the first 20 steps, in "
        "those after a warm-up, and in every 50th. Relative change: the size of the change ÷ the "
        "size of what was changed. Cosine: between before and after. Trigger rate: the share of "
        "steps with any change."
    )
    return f"{text} {curves.over_seeds(data)}" if data.effects else text


def _present(*tables: content.PageTable | None) -> list[content.PageTable]:
    return [table for table in tables if table is not None]


def _svg_file(path: Path, drawing: Drawing) -> Path:
    return path / FIGURES_FOLDER / f"{drawing.name}.svg"


def _write_svg(path: Path, drawing: Drawing) -> Path:
    """Write a figure as a file that stands alone."""
    make_folder(path, FIGURES_FOLDER)
    file = _svg_file(path, drawing)
    write_whole(file, as_svg(draw_plain(drawing), title=drawing.title))
    return file


def _render(data: ReportData, sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=TEMPLATES,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _file_of_this_package(environment, "report.css")
    script = _file_of_this_package(environment, "report.js")
    processes = int(data.about.get("processes", 1))
    return environment.get_template("report.html").render(
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
        version=version("regrad-runner"),
        workload=str(data.about.get("workload", "")),
        headline=headline(data.summaries),
        rest=rest(data.summaries),
        brief=content.in_brief(data),
        resolution=content.resolution(data),
        script_sha256=content.digest_of_script(data),
        verdicts=content.verdicts(data),
        remarks=[*content.remarks(data), *content.missing(data)],
        offers=content.offers(data),
        more=content.more_table(data),
        sections=[_shown(section, data) for section in sections],
        run_tables=_run_tables(data),
        command=command_to_repeat(data.settings, processes=processes),
    )


def _shown(section: Section, data: ReportData) -> dict[str, Any]:
    """Return a section as the template reads it."""
    order = [data.baseline, *in_families(data.summaries)]
    styles = dict(sorted(section.styles.items(), key=lambda item: _place(item[0], order)))
    keys = {series: number for number, series in enumerate(styles)}
    tones = content.tones(data)
    first = section.drawings[:1]
    has_families = len(section.families) > 1 and first
    panels = (
        small_multiples(first[0], section.families, section.baseline, keys) if has_families else []
    )
    return {
        "name": section.name,
        "title": section.title,
        "text": section.text,
        "tables": section.tables,
        "is_folded": section.is_folded,
        "plots": [plot_of(drawing, keys, tones) for drawing in section.drawings],
        "panels": panels,
        "folded": [plot_of(drawing, keys, tones) for drawing in section.folded_drawings],
        "legend": [
            {"name": series, "key": keys[series], "look": look_of(style), "style": style}
            for series, style in styles.items()
        ],
    }


def _place(series: str, order: Sequence[str | None]) -> int:
    """Return the place of an arm's curve in a legend; curves of parts of arms keep theirs."""
    return order.index(series) if series in order else len(order)


def _run_tables(data: ReportData) -> Iterable[content.PageTable]:
    """Return the tables of what was run."""
    return _present(
        content.corrections_table(data),
        content.controls_table(data),
        content.rates_table(data),
        content.settings_table(data),
        content.machines_table(data),
    )


def _file_of_this_package(environment: Environment, name: str) -> str:
    return TEMPLATES.get_source(environment, name)[0]


def _policy_hash(text: str) -> str:
    """Return what the page's content security policy allows a text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
