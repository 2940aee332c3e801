"""Show a folder: the table and figures of a comparison, the numbers of a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrad_runner.addresses import shown_address
from regrad_runner.diagnostics.effects import EFFECTS_FILE, Effect, kept_effects
from regrad_runner.diagnostics.exits import EXITS_FILE, ExitOutcome, kept_exits
from regrad_runner.diagnostics.explaining import Explanation
from regrad_runner.diagnostics.gradient_quality import (
    QUALITY_FILE,
    Quality,
    kept_qualities,
    mean_qualities,
)
from regrad_runner.diagnostics.step_times import kept_step_times, why_not_measured
from regrad_runner.reporting.explanation import as_json as explanation_as_json
from regrad_runner.reporting.explanation import as_text
from regrad_runner.reporting.measures import measure_in
from regrad_runner.reporting.rates import rates_as_json, rates_at_edges
from regrad_runner.reporting.report_data import read_report_data
from regrad_runner.reporting.resolution import resolution_in_words, resolution_of
from regrad_runner.reporting.summaries import has_step_times, summarize_folder
from regrad_runner.reporting.table import print_comparison, print_qualities, to_json
from regrad_runner.reporting.unsteady import in_words, lower_rates
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import in_ranges
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.locks import drawing
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.pairs import unlike_in_words, unlike_pairs
from regrad_runner.results.receipts import read_receipt
from regrad_runner.results.tables import write_rows
from regrad_runner.settings.loading import read_settings
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.terminal import Terminal
from regrad_runner.workloads.workload import Measure, name_on_validation


def show(path: Path, *, as_json: bool = False) -> None:
    """Show what is in a folder, whichever command wrote it; draw a comparison's figures again.

    Args:
        path: What `compare` or `train` wrote.
        as_json: Print JSON instead of text.

    Raises:
        ValueError: If it is no such folder, if it holds no finished run or something damaged, or
            while a command writes it.
        DiskError: If the figures cannot be written.
    """
    about = _read_about(path)
    if about["kind"] != "comparison":
        show_run(path, as_json=as_json)
        return
    with drawing(path):
        folder = ResultsFolder(path)
        export_tables(folder)
        draw(folder, about["measure"])
    show_comparison(path, as_json=as_json)


def check_whole(path: Path) -> None:
    """Raise a `ValueError` if a run or a receipt is damaged that a comparison or run goes on with.

    Args:
        path: What `compare` or `train` wrote.
    """
    folder = ResultsFolder(path)
    kept_effects(folder)
    kept_qualities(folder)
    for result in folder.results:
        receipt = folder.receipt_file(result.arm, result.seed)
        if os.path.lexists(receipt):
            read_receipt(receipt)


def export_tables(folder: ResultsFolder) -> None:
    """Write the tables of a folder from its runs; one that would be empty is left out.

    Args:
        folder: Of a comparison or run.

    Raises:
        DiskError: If they cannot be written to disk.
    """
    tables: dict[str, tuple[Sequence[Any], type[Any]]] = {
        "tuning.csv": (folder.trials, Trial),
        "curves.csv": (folder.curves, CurvePoint),
        QUALITY_FILE: (kept_qualities(folder), Quality),
        EFFECTS_FILE: (kept_effects(folder), Effect),
        EXITS_FILE: (kept_exits(folder), ExitOutcome),
        "results.csv": (folder.results, Result),
    }
    for name, (rows, kind) in tables.items():
        if rows:
            write_rows(folder.path / name, rows, kind)


def draw(folder: ResultsFolder, measure: Measure) -> list[Path]:
    """Draw a comparison's figures and its page into its folder, and return the files."""
    # matplotlib takes a second to load
    from regrad_runner.reporting.figures.png import write_pngs  # noqa: PLC0415
    from regrad_runner.reporting.page.write import write_page  # noqa: PLC0415

    summaries = summarize_folder(folder, measure)
    data = read_report_data(folder, measure, summaries)
    return [*write_pngs(data, folder.path), *write_page(data)]


def show_comparison(path: Path, *, as_json: bool = False) -> None:
    """Print a comparison's table, a sentence per arm, and where everything is.

    Raises:
        ValueError: If the folder holds no comparison, or no run.
    """
    about = _read_about(path)
    measure = about["measure"]
    folder = ResultsFolder(path)
    summaries = summarize_folder(folder, measure)
    console = Terminal()
    if as_json:
        text = _comparison_as_json(folder, summaries, about)
        console.out(text, highlight=False)
        return
    print_comparison(console, summaries, measure)
    print_qualities(console, kept_qualities(folder))
    for offer in lower_rates(folder, summaries):
        console.print_line(in_words(offer), wrap=True)
    for pair in unlike_pairs(folder)[:1]:
        console.print_line(f"warning: {unlike_in_words(pair)}", wrap=True)
    _print_resolution(console, about, measure)
    if not has_step_times(summaries):
        console.print_line(f"step times are unknown: {why_not_measured(about)}", wrap=True)
    for name, why in about.get("left_out", {}).items():
        console.print_line(f"left out: {name} ({why})", wrap=True)
    _print_rates(console, folder, measure)
    _print_failures(console, folder)
    _print_missing(console, folder)
    _print_places(console, path)


def show_run(path: Path, *, as_json: bool = False) -> None:
    """Print the result of a run.

    Raises:
        ValueError: If the folder holds no run, or it has not ended.
    """
    measure = _read_about(path)["measure"]
    folder = ResultsFolder(path)
    result = _ended_run(folder)
    console = Terminal()
    if as_json:
        text = json.dumps({"measure": asdict(measure), "run": asdict(result)}, indent=2)
        console.out(text, highlight=False)
        return
    effects = _effects_in_words(folder.receipt_file(result.arm, result.seed))
    title = f"{result.arm}, seed {result.seed}, learning rate {result.lr:g}"
    console.print_line(title, style="bold", wrap=True)
    for name, value in _run_in_words(result, measure).items():
        console.print_line(f"  {name:<24} {value}", wrap=True)
    for name, value in effects.items():
        console.print_line(f"  {name:<24} {value}")
    _print_places(console, path)


def show_explanation(
    explanation: Explanation, *, as_json: bool = False, every_tensor: bool = False
) -> None:
    """Print what corrections would change, and at what cost.

    Args:
        explanation: From `regrad_runner.diagnostics.explaining.explain`.
        as_json: Print all of it as JSON.
        every_tensor: Show all tensors instead of those that change most.
    """
    console = Terminal(soft_wrap=True)
    if as_json:
        console.out(explanation_as_json(explanation), highlight=False)
        return
    console.out(as_text(explanation, every_tensor=every_tensor), highlight=False)


def open_ui(path: Path) -> str | None:
    """Return the command that shows a folder's tracked runs, or where they are.

    Returns:
        None if they were not tracked.
    """
    try:
        settings = read_settings(path / "config.yaml")
    except ValueError:
        return None
    if settings.get("tracker") == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}"
    if settings.get("tracker") != "mlflow":
        return None
    uri = shown_address(str(settings.get("tracking_uri") or ""))
    if uri and not uri.startswith("sqlite"):
        return f"open {uri}"
    database = f"sqlite:///{(path / 'mlflow.db').as_posix()}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri or database)}"


def _read_about(path: Path) -> dict[str, Any]:
    """Return what the folder says about itself, with its measure as a `Measure`."""
    about = read_about(path)
    measure = measure_in(about)
    if measure is None or "kind" not in about:
        raise ValueError(f"folder must be one that compare or train wrote, got '{path}'")
    return {**about, "measure": measure}


def _comparison_as_json(
    folder: ResultsFolder, summaries: list[ArmSummary], about: dict[str, Any]
) -> str:
    """Return all that is known of a comparison.

    Args:
        folder: Its runs.
        summaries: Its arms.
        about: What the folder says about itself, from `_read_about`.
    """
    measure = about["measure"]
    resolution = resolution_of(about, measure)
    times = kept_step_times(folder.path)
    more: dict[str, Any] = {
        "left_out": about.get("left_out", {}),
        "resolution": None if resolution is None else asdict(resolution),
        "step_times": {arm: asdict(found) for arm, found in times.items()},
        "unlike_pairs": [asdict(pair) for pair in unlike_pairs(folder)],
        "lower_rates": [asdict(offer) for offer in lower_rates(folder, summaries)],
    }
    qualities = kept_qualities(folder)
    if qualities:
        more["gradient_quality"] = mean_qualities(qualities)
    if folder.trials:
        more["learning_rates"] = rates_as_json(folder.choices)
    more["missing_cells"] = folder.missing
    return to_json(summaries, measure, **more)


def _ended_run(folder: ResultsFolder) -> Result:
    """Return the run of a folder that `train` wrote.

    Raises:
        ValueError: If there is none, or it has not ended.
    """
    results = folder.results
    if not results or results[-1].value is None or results[-1].validation is None:
        raise ValueError(
            f"folder must hold a run that ended, got '{folder.path}'; regrad train --resume --out "
            "continues it"
        )
    return results[-1]


def _run_in_words(result: Result, measure: Measure) -> dict[str, str]:
    """Return the result of a run, by name."""
    values = {measure.name: result.value, name_on_validation(measure): result.validation}
    lines = {name: measure.written(value) for name, value in values.items() if value is not None}
    lines["optimizer steps"] = f"{result.steps:,}"
    lines["time per step"] = f"{result.step_seconds * 1e3:.2f} ms"
    if measure.fixed_target is not None:
        reached = "never" if result.steps_to_target is None else f"{result.steps_to_target:,}"
        lines[f"steps to {measure.fixed_target:g}"] = reached
    return lines


def _effects_in_words(file: Path) -> dict[str, str]:
    """Return one line per correction and stage of a run's receipt."""
    lines = {}
    for name, stages in read_receipt(file).get("effects", {}).items():
        for stage, seen in stages.items():
            lines[f"{name} on {stage}"] = (
                f"{100 * seen['share_touched']:.0f} % of tensors, relative change "
                f"{seen['relative_change']:.2g}, cosine {seen['cosine']:.3f}"
            )
    return lines


def _print_resolution(console: Terminal, about: dict[str, Any], measure: Measure) -> None:
    """Say how many samples the numbers rest on, if the folder says so."""
    resolution = resolution_of(about, measure)
    if resolution is None:
        return
    console.print_line(resolution_in_words(resolution, measure), wrap=True)
    if resolution.warning:
        console.print_line(f"warning: {resolution.warning}", wrap=True)


def _print_rates(console: Terminal, folder: ResultsFolder, measure: Measure) -> None:
    """Say which learning rate each arm chose, if there was a choice."""
    if not folder.trials:
        return
    chosen = {result.arm: result.lr for result in folder.results}
    rates = ", ".join(f"{arm} {lr:g}" for arm, lr in chosen.items())
    where = "on the validation split"
    if name_on_validation(measure) == measure.name:  # of a script, which has one measure
        where = "by trials"
    console.print_line(f"learning rates chosen {where}: {rates}", wrap=True)
    for line in rates_at_edges(folder.choices):
        console.print_line(line, wrap=True)


def _print_failures(console: Terminal, folder: ResultsFolder) -> None:
    """Say how many runs failed, and where the reason is."""
    failed = sum(result.status == "failed" for result in folder.results)
    if failed:
        console.print_line(
            f"{failed} of {len(folder.results)} runs failed: {folder.path / 'failures.txt'} says "
            f"why; regrad compare --resume --out {folder.path} repeats them"
        )


def _print_missing(console: Terminal, folder: ResultsFolder) -> None:
    """Say which runs are still to come."""
    if folder.missing:
        console.print_line(
            f"{len(folder.missing)} of {len(folder.cells)} cells are missing: "
            f"{in_ranges(folder.missing)}; regrad compare --resume --out {folder.path} runs them, "
            "or --cell each of them"
        )


def _print_places(console: Terminal, path: Path) -> None:
    """Say where everything is."""
    console.print_line("")
    page = path / "report.html"
    if page.is_file():
        console.print_line(f"report with all figures: {page}")
    console.print_line(f"everything is in {path}; regrad report {path} shows this again")
    command = open_ui(path)
    if command is not None:
        console.print_line(f"curves and receipts of every run: {command}")
