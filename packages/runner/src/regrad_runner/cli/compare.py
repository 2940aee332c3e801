"""The command `regrad compare`. What is heavy is imported when it is used."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrad_runner.cli.flags import ConfigFile, Json, Out, Resume, flag, switch
from regrad_runner.cli.holding import holding, holding_folder
from regrad_runner.cli.settings_flags import CHECKING, load_settings, takes_settings
from regrad_runner.errors import checking_input
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.flag import HOW_IT_IS_TRAINED, WHERE_IT_GOES

if TYPE_CHECKING:
    from rich.console import Console

    from regrad_runner.comparing.plan import Plan

COMPARE_EXAMPLES = (
    "regrad compare --corrections xgrad agc xgrad+agc --lr 0.02,0.05,0.1",
    "regrad compare --workload imagefolder --data-dir DIR --seeds 6",
    "regrad compare --resume --out DIR --seeds 12",
)


@takes_settings(CompareConfig)
def compare_command(
    given: dict[str, Any],
    *,
    jobs: Annotated[
        int | None,
        flag(
            "Runs in parallel; by default one per CPU core, one on a GPU.",
            HOW_IT_IS_TRAINED,
            metavar="N",
        ),
    ] = None,
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = False,
    cells: Annotated[
        bool, switch("Prepare --out for a job array and list its cells.", WHERE_IT_GOES, "--cells")
    ] = False,
    cell: Annotated[
        int | None,
        flag("Run this cell of the job array in --out.", WHERE_IT_GOES, metavar="N"),
    ] = None,
    json: Json = False,
) -> int:
    """Compare corrections with the baseline and with the trivial changes they must beat.

    Without flags: powergrad, xgrad and both, with their controls, on handwritten digits, 10 seeds.
    A number without a default here depends on the workload.
    """
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    console = Terminal(stderr=True)  # results go elsewhere, perhaps into another program
    with checking_input(), console.status(CHECKING):
        from regrad_runner.comparing.plan import make_plan  # noqa: PLC0415

        _check_at_most_one(jobs=jobs, cell=cell, cells=cells)
        continues = resume or cell is not None
        settings = load_settings(CompareConfig, given, config=config, out=out, resume=continues)
        if cell is None:
            plan = make_plan(settings, out=out, resume=resume, jobs=jobs)
    if cell is not None:
        return _run_cell(console, settings, cell, out or Path())
    with holding_folder(plan, resume=resume):
        if cells:
            return _prepare_cells(console, plan, as_json=json)
        return _compare(console, plan, jobs=jobs, as_json=json)


def _check_at_most_one(*, jobs: int | None, cell: int | None, cells: bool) -> None:
    """Raise a `ValueError` if flags were given that exclude each other."""
    given = []
    if jobs is not None:
        given.append("--jobs")
    if cell is not None:
        given.append("--cell")
    if cells:
        given.append("--cells")
    if len(given) > 1:
        raise ValueError(f"{given[0]} must be given without {given[1]}")


def _compare(console: Console, plan: Plan, *, jobs: int | None, as_json: bool) -> int:
    """Run a comparison and show it."""
    from regrad_runner.comparing.compare import compare  # noqa: PLC0415
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.reporting.report import show_comparison  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

    display = Display(console, runs=plan.runs, quiet=not plan.reports)
    display.say(plan.in_words())
    again = f"regrad compare --resume --out {plan.path}"
    if jobs:
        again = f"{again} --jobs {jobs}"
    with going_on(console, again, quiet=not plan.reports), display:
        folder = compare(plan, display)
    destroy_process_group()
    if plan.reports:
        show_comparison(folder.path, as_json=as_json)
    return int(any(result.status == "failed" for result in folder.results))


def _run_cell(console: Console, settings: CompareConfig, number: int, out: Path) -> int:
    """Run one cell of a job array."""
    with checking_input(), console.status(CHECKING):
        from regrad_runner.comparing.job_array import make_cell_plan, run_cell  # noqa: PLC0415
        from regrad_runner.results.locks import running_cell  # noqa: PLC0415

        cell_plan = make_cell_plan(settings, number, out)
    from regrad_runner.comparing.compare import outcome_in_words  # noqa: PLC0415
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.results.outcomes import Result  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

    plan = cell_plan.plan
    name = f"cell {number}: {cell_plan.name}"
    display = Display(console, runs=1, quiet=not plan.reports)
    if cell_plan.cell is None or cell_plan.done:
        display.say(f"{name}: {cell_plan.done}")
        return 0
    lock: AbstractContextManager[None] = nullcontext()
    if plan.reports:
        lock = holding(running_cell(plan.path, *cell_plan.cell.folder_names))
    again = f"regrad compare --out {out} --cell {number}"
    with lock, going_on(console, again, quiet=not plan.reports), display:
        outcome = run_cell(cell_plan, display)
        if outcome is not None:
            display.end(f"{name}: {outcome_in_words(outcome, plan.workload.measure)}")
    destroy_process_group()
    return int(isinstance(outcome, Result) and outcome.status == "failed")


def _prepare_cells(console: Console, plan: Plan, *, as_json: bool) -> int:
    """Make the folder of a job array and say what its cells are."""
    from regrad_runner.comparing.job_array import prepare_cells, show_prepared  # noqa: PLC0415

    numbers = prepare_cells(plan, say=console.print)
    if plan.reports:
        typer.echo(show_prepared(plan.path, numbers, as_json=as_json))
    return 0
