"""What a folder shows: the table and figures of a comparison, the numbers of a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrad_runner.addresses import shown_address
from regrad_runner.diagnostics.effects import FILE as EFFECTS
from regrad_runner.diagnostics.effects import Effect, kept_effects
from regrad_runner.diagnostics.explaining import Explanation
from regrad_runner.diagnostics.gradient_quality import FILE as QUALITIES
from regrad_runner.diagnostics.gradient_quality import (
    Quality,
    kept_qualities,
    mean_qualities,
    print_qualities,
)
from regrad_runner.reporting.explanation import as_json as explanation_as_json
from regrad_runner.reporting.explanation import as_text
from regrad_runner.reporting.table import print_comparison, to_json
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import in_ranges
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.locks import drawing
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.receipts import read_receipt
from regrad_runner.results.tables import write_rows
from regrad_runner.settings.loading import read_settings
from regrad_runner.statistics.verdicts import ArmSummary, summarize
from regrad_runner.terminal import Terminal
from regrad_runner.workloads.workload import Measure, name_on_validation


def show(path: Path, *, as_json: bool = False) -> None:
    """Show what is in a folder, whichever command wrote it; draw the figures of a comparison again.

    Args:
        path: What `compare` or `train` wrote.
        as_json: Print JSON instead of text.

    Raises:
        ValueError: If it is no such folder, holds no finished run or something damaged, or a command writes it.
        DiskError: If the figures cannot be written.
    """
    if _about(path)["kind"] != "comparison":
        show_run(path, as_json=as_json)
        return
    with drawing(path):
        folder = ResultsFolder(path)
        export_tables(folder)
        draw(folder, _about(path)["measure"])
    show_comparison(path, as_json=as_json)


def check_whole(path: Path) -> None:
    """Raise a `ValueError` where a run or a receipt that a comparison or run goes on with is damaged.

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
        DiskError: If the disk does not take them.
    """
    tables: dict[str, tuple[Sequence[Any], type[Any]]] = {
        "tuning.csv": (folder.trials, Trial),
        "curves.csv": (folder.curves, CurvePoint),
        QUALITIES: (kept_qualities(folder), Quality),
        EFFECTS: (kept_effects(folder), Effect),
        "results.csv": (folder.results, Result),
    }
    for name, (rows, kind) in tables.items():
        if rows:
            write_rows(folder.path / name, rows, kind)


def draw(folder: ResultsFolder, measure: Measure) -> list[Path]:
    """Draw the figures of a comparison and its page into its folder and return the files."""
    from regrad_runner.reporting.figures import write_figures  # noqa: PLC0415 - matplotlib takes a second to load
    from regrad_runner.reporting.page.write import write_page  # noqa: PLC0415 - as above

    rows = [result.as_run_row() for result in folder.results]
    summaries = summarize_results(folder.results, measure)
    pictures = write_figures(
        folder.curves, folder.path, rows=rows, summaries=summaries, measure=measure
    )
    return [*pictures, *write_page(folder, measure, summaries)]


def show_comparison(path: Path, *, as_json: bool = False) -> None:
    """Print a comparison's table, a sentence per arm, and where everything is.

    Raises:
        ValueError: If the folder holds no comparison, or no run.
    """
    measure, left_out = _about(path)["measure"], _about(path).get("left_out", {})
    folder, console = ResultsFolder(path), Terminal()
    summaries = summarize_results(folder.results, measure)
    qualities = kept_qualities(folder)
    if as_json:
        more: dict[str, Any] = {"gradient_quality": mean_qualities(qualities)} if qualities else {}
        more["missing_cells"] = folder.missing
        console.out(to_json(summaries, measure, left_out=left_out, **more), highlight=False)
        return
    print_comparison(console, summaries, measure)
    print_qualities(console, qualities)
    for name, why in left_out.items():
        console.print(
            f"left out: {name} ({why})",
            highlight=False,
            markup=False,
            soft_wrap=not console.is_terminal,
        )
    _print_rates(console, folder)
    failed = sum(result.status == "failed" for result in folder.results)
    if failed:
        where = (
            f"{path / 'failures.txt'} says why; regrad compare --resume --out {path} repeats them"
        )
        line = f"{failed} of {len(folder.results)} runs failed: {where}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if folder.missing:
        which = f"{len(folder.missing)} of {len(folder.cells)} runs are missing: cells {in_ranges(folder.missing)}"
        goes_on = f"regrad compare --resume --out {path} runs them, or --cell each of them"
        console.print(f"{which}; {goes_on}", highlight=False, markup=False, soft_wrap=True)
    _print_places(console, path)


def summarize_results(results: list[Result], measure: Measure) -> list[ArmSummary]:
    """Return one summary per arm, in the order in which the arms first ran.

    Raises:
        ValueError: If there is no run.
    """
    if not results:
        raise ValueError(
            "folder must hold runs, got none; regrad compare --resume --out starts them"
        )
    beaten = {result.must_beat for result in results}
    alone = {
        result.arm
        for result in results
        if result.control or (result.control is None and result.arm in beaten)
    }
    return summarize(
        [result.as_run_row() for result in results],
        controls={result.arm: result.must_beat for result in results if result.arm not in alone},
        higher_is_better=measure.higher_is_better,
    )


def show_run(path: Path, *, as_json: bool = False) -> None:
    """Print what a run came to.

    Raises:
        ValueError: If the folder holds no run, or it has not ended.
    """
    measure = _about(path)["measure"]
    folder = ResultsFolder(path)
    if not folder.results or None in (folder.results[-1].value, folder.results[-1].validation):
        raise ValueError(
            f"folder must hold a run that ended, got '{path}'; regrad train --resume --out goes on"
        )
    result, console = folder.results[-1], Terminal()
    if as_json:
        console.out(
            json.dumps({"measure": asdict(measure), "run": asdict(result)}, indent=2),
            highlight=False,
        )
        return
    lines = {
        measure.name: measure.written(result.value),
        name_on_validation(measure): measure.written(result.validation),
        "optimizer steps": f"{result.steps:,}",
        "time per step": f"{result.step_seconds * 1e3:.2f} ms",
    }
    if measure.target is not None:
        reached = "never" if result.steps_to_target is None else f"{result.steps_to_target:,}"
        lines[f"steps to {measure.target:g}"] = reached
    effects = _effects(folder.receipt_file(result.arm, result.seed))
    title = f"{result.arm}, seed {result.seed}, learning rate {result.lr:g}"
    console.print(title, style="bold", highlight=False, markup=False)
    for name, value in lines.items():
        console.print(f"  {name:<24} {value}", highlight=False, markup=False)
    for name, value in effects.items():
        console.print(f"  {name:<24} {value}", highlight=False, markup=False, soft_wrap=True)
    _print_places(console, path)


def show_explanation(
    explanation: Explanation, *, as_json: bool = False, every_tensor: bool = False
) -> None:
    """Print what corrections would change, and at what cost; all of it as JSON."""
    text = (
        explanation_as_json(explanation)
        if as_json
        else as_text(explanation, every_tensor=every_tensor)
    )
    Terminal(soft_wrap=True).out(text, highlight=False)


def open_ui(path: Path) -> str | None:
    """Return the command that shows a folder's tracked runs, or where they are; None if they were not tracked."""
    try:
        settings = read_settings(path / "config.yaml")
    except ValueError:
        return None
    if settings.get("tracker") != "mlflow":
        return None
    uri = shown_address(str(settings.get("tracking_uri") or ""))
    if uri and not uri.startswith("sqlite"):
        return f"open {uri}"
    database = f"sqlite:///{(path / 'mlflow.db').as_posix()}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri or database)}"


def _about(path: Path) -> dict[str, Any]:
    """Return what the folder says about itself."""
    about = read_about(path)
    measure = about.get("measure")
    try:
        made = Measure(**measure) if isinstance(measure, dict) else None
    except TypeError:
        made = None
    if made is None or not made.is_whole or "kind" not in about:
        raise ValueError(f"folder must be one that compare or train wrote, got '{path}'")
    return {**about, "measure": made}


def _effects(file: Path) -> dict[str, str]:
    """Return one line per correction and stage of a run's receipt."""
    receipt = read_receipt(file)
    return {
        f"{name} on {stage}": f"{100 * seen['share_touched']:.0f} % of tensors, relative change "
        f"{seen['relative_change']:.2g}, cosine {seen['cosine']:.3f}"
        for name, stages in receipt.get("effects", {}).items()
        for stage, seen in stages.items()
    }


def _print_rates(console: Terminal, folder: ResultsFolder) -> None:
    """Say which learning rate each arm chose, where there was a choice."""
    if folder.trials:
        chosen = {result.arm: result.lr for result in folder.results}
        rates = ", ".join(f"{arm} {lr:g}" for arm, lr in chosen.items())
        wrap = not console.is_terminal
        line = f"learning rates chosen on the validation split: {rates}"
        console.print(line, highlight=False, markup=False, soft_wrap=wrap)


def _print_places(console: Terminal, path: Path) -> None:
    page = path / "report.html"
    if page.is_file():
        line = f"\nfigures and everything else to look at: {page}"
        console.print(line, highlight=False, markup=False, soft_wrap=True, end="")
    line = f"\neverything is in {path}; regrad report {path} shows this again"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    command = open_ui(path)
    if command is not None:
        line = f"curves and receipts of every run: {command}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
