"""The command `regrad compare`. What is heavy is imported when it is used."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrad_runner.cli.corrections_flag import more_corrections
from regrad_runner.cli.flags import ConfigFile, Json, On, Out, Slurm, flag, switch
from regrad_runner.cli.holding import holding, holding_folder
from regrad_runner.cli.resuming import Resume, read_resume
from regrad_runner.cli.settings_flags import CHECKING, load_settings, takes_settings
from regrad_runner.errors import checking_input
from regrad_runner.settings.cluster import SLURM, Cluster, cluster_of
from regrad_runner.settings.config import CompareConfig, ComparisonSettings
from regrad_runner.settings.flag import HOW_IT_IS_TRAINED, THE_SCRIPT, WHERE_IT_GOES
from regrad_runner.settings.script_config import ScriptConfig, comparison_settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from regrad_runner.comparing.plan import Planned

COMPARE_EXAMPLES = (
    "regrad compare --corrections xgrad agc xgrad+agc --lr 0.02,0.05,0.1",
    "regrad compare --measure 'loss=val loss ([0-9.]+)' --lower-is-better "
    "-- train.py --seed '{seed}'",
    "regrad compare --workload imagefolder --data-dir DIR --seeds 6",
    "regrad compare --resume --out DIR --seeds 12",
    "regrad compare --resume auto --corrections xgrad agc --out DIR",
    "regrad compare --on slurm --slurm partition=gpu,time=04:00:00",
)


@takes_settings(CompareConfig, ScriptConfig)
def compare_command(
    given: dict[str, Any],
    script: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- SCRIPT ARGS...]",
            help="A script of your own to compare instead of a workload; {seed}, {lr}, {out} and "
            "{arm} are filled in.",
            show_default=False,
            autocompletion=more_corrections,
        ),
    ] = None,
    *,
    higher_is_better: Annotated[
        bool,
        switch("Higher values of --measure are better.", THE_SCRIPT, "--higher-is-better"),
    ] = False,
    lower_is_better: Annotated[
        bool,
        switch("Lower values of --measure are better.", THE_SCRIPT, "--lower-is-better"),
    ] = False,
    jobs: Annotated[
        int | None,
        flag(
            "Runs in parallel; by default one per CPU core, one on a GPU.",
            HOW_IT_IS_TRAINED,
            metavar="N",
        ),
    ] = None,
    on: On = None,
    slurm: Slurm = None,
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = None,
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

    console = Terminal(stderr=True)  # results go to stdout, perhaps into another program
    with checking_input(), console.status(CHECKING):
        from regrad_runner.tracking.choosing import check_tracker  # noqa: PLC0415

        _check_at_most_one(jobs=jobs, cell=cell, cells=cells)
        resuming = read_resume(resume, out=out)
        has_settings = resuming.takes_settings or cell is not None
        cluster = _cluster(on, slurm, jobs=jobs, is_job_array=cells or cell is not None)
        _check_are_corrections(given.get("corrections", ()))
        if script:
            _check_is_script(script)
            given["script"] = script
        given |= _direction(higher=higher_is_better, lower=lower_is_better)
        kind = _kind(given, config=config, out=out if has_settings else None)
        settings = load_settings(kind, given, config=config, out=out, resume=has_settings)
        if cell is None:
            check_tracker(settings, given, resume=has_settings)
            plan = _make_plan(
                settings, out=out, resume=resuming.continues, jobs=jobs, cluster=cluster
            )
    if cell is not None:
        return _run_cell(console, settings, cell, out or Path())
    with holding_folder(plan, resuming):
        if cells:
            return _prepare_cells(console, plan, as_json=json)
        return _compare(console, plan, jobs=jobs, as_json=json)


def _check_are_corrections(names: Sequence[str]) -> None:
    """Raise a `ValueError` if the script is among the corrections."""
    for name in names:
        if name == "--":
            raise ValueError("corrections must be named between --corrections and '--', got none")
        if Path(name).suffix == ".py":
            raise ValueError(
                f"script must come after '--', got {name!r} among the corrections; write: -- {name}"
            )


def _check_is_script(words: list[str]) -> None:
    """Raise a `ValueError` if corrections are given in place of a script."""
    from regrad_runner.scripts.running import check_script  # noqa: PLC0415

    first = Path(words[0])
    names_file = first.suffix or len(first.parts) > 1 or first.is_file()
    if names_file or words[0] in ("-m", "python", "python3"):
        check_script(words)
        return
    raise ValueError(
        f"script must be a file, got {words[0]!r}; corrections go after --corrections, such as "
        f"--corrections {words[0]}"
    )


def _direction(*, higher: bool, lower: bool) -> dict[str, str]:
    """Return the setting that two flags stand for."""
    if higher and lower:
        raise ValueError("--higher-is-better must be given without --lower-is-better")
    if higher:
        return {"better": "higher"}
    if lower:
        return {"better": "lower"}
    return {}


def _kind(
    given: dict[str, Any], *, config: Path | None, out: Path | None
) -> type[ComparisonSettings]:
    """Return which settings a command is about: of a script or of a workload.

    Args:
        given: Those that were given as flags.
        config: The file with others.
        out: A folder to continue.
    """
    from regrad_runner.settings.loading import read_settings  # noqa: PLC0415

    known = dict(given)
    file = config or (out / "config.yaml" if out is not None else None)
    if file is not None and file.is_file():
        known = {**read_settings(file), **given}
    kind = comparison_settings_of(known)
    for name, value in given.items():
        if name not in kind.model_fields:
            raise ValueError(_out_of_place(name, value, kind))
    if kind is ScriptConfig:
        _check_is_complete(known)
    return kind


def _out_of_place(name: str, value: Any, kind: type[ComparisonSettings]) -> str:
    """Say why a flag does not belong to what is compared."""
    flag_name = f"--{name.replace('_', '-')}"
    if name == "better":
        flag_name = f"--{value}-is-better"
    if kind is ScriptConfig:
        return f"{flag_name} must be left out with a script, which decides that itself"
    return f"{flag_name} must be given with a script of your own after '--'"


def _check_is_complete(known: dict[str, Any]) -> None:
    """Raise a `ValueError` if a comparison of a script lacks what only the user knows."""
    if "measure" not in known:
        raise ValueError(
            "--measure must be given with a script, such as --measure 'loss=val loss ([0-9.]+)'"
        )
    if "better" not in known:
        raise ValueError(
            "--higher-is-better or --lower-is-better must be given with --measure, got neither"
        )


def _make_plan(
    settings: ComparisonSettings,
    *,
    out: Path | None,
    resume: bool,
    jobs: int | None,
    cluster: Cluster | None,
) -> Planned[Any]:
    """Check a comparison of whatever kind, and return its plan."""
    from regrad_runner.comparing.cluster_cells import on_cluster  # noqa: PLC0415

    if isinstance(settings, ScriptConfig):
        from regrad_runner.comparing.script_plan import make_script_plan  # noqa: PLC0415

        plan = make_script_plan(settings, out=out, resume=resume, jobs=jobs)
        return on_cluster(plan, cluster)
    if not isinstance(settings, CompareConfig):
        raise TypeError(f"settings must be those of a comparison, got {type(settings).__name__}")
    from regrad_runner.comparing.plan import make_plan  # noqa: PLC0415

    return on_cluster(make_plan(settings, out=out, resume=resume, jobs=jobs), cluster)


def _cluster(
    place: str | None, slurm: str | None, *, jobs: int | None, is_job_array: bool
) -> Cluster | None:
    """Return the queue in which runs are jobs, checked; None if this command runs them."""
    cluster = cluster_of(place, slurm)
    if cluster is None:
        return None
    if is_job_array:
        raise ValueError("--on must be given without --cells and --cell, whose jobs are your own")
    if cluster.place == SLURM and jobs is not None:
        raise ValueError(
            f"--jobs must be given without --on slurm, got {jobs}; "
            f"limit the jobs with --slurm array_parallelism={jobs}"
        )
    from regrad_runner.comparing.queues import check_queue  # noqa: PLC0415

    check_queue(cluster)
    return cluster


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


def _compare(console: Console, plan: Planned[Any], *, jobs: int | None, as_json: bool) -> int:
    """Run a comparison and show it."""
    from regrad_runner.comparing.compare import compare  # noqa: PLC0415
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.reporting.report import show_comparison  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

    display = Display(console, runs=plan.runs, quiet=not plan.reports)
    display.say(plan.in_words())
    again = shlex.join(["regrad", "compare", "--resume", "--out", str(plan.path)])
    if jobs:
        again = f"{again} --jobs {jobs}"
    if plan.cluster is not None:
        again = f"{again} {plan.cluster.words}"
    with going_on(console, again, quiet=not plan.reports), display:
        folder = compare(plan, display)
    destroy_process_group()
    if plan.reports:
        show_comparison(folder.path, as_json=as_json)
    return int(any(result.status == "failed" for result in folder.results))


def _run_cell(console: Console, settings: ComparisonSettings, number: int, out: Path) -> int:
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
    again = shlex.join(["regrad", "compare", "--out", str(out), "--cell", str(number)])
    with lock, going_on(console, again, quiet=not plan.reports), display:
        outcome = run_cell(cell_plan, display)
        if outcome is not None:
            display.end(f"{name}: {outcome_in_words(outcome, plan.measure)}")
    destroy_process_group()
    return int(isinstance(outcome, Result) and outcome.status == "failed")


def _prepare_cells(console: Console, plan: Planned[Any], *, as_json: bool) -> int:
    """Make the folder of a job array and say what its cells are."""
    from regrad_runner.comparing.job_array import prepare_cells, show_prepared  # noqa: PLC0415

    numbers = prepare_cells(plan, say=console.print)
    if plan.reports:
        typer.echo(show_prepared(plan.path, numbers, as_json=as_json))
    return 0
