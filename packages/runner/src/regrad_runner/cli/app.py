"""The commands: from flags to plans, from results to the screen. What is heavy is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regrad_runner.cli import flags as o
from regrad_runner.cli.plugins import plugins
from regrad_runner.errors import checking_input

if TYPE_CHECKING:
    from rich.console import Console

    from regrad_runner.comparing.plan import Plan
    from regrad_runner.settings.config import CompareConfig, Config
    from regrad_runner.training_command import Plan as TrainPlan

CHECKING = "checking settings, data and corrections"

app = typer.Typer(
    name="regrad",
    help="Compare gradient corrections on your data: paired seeds, controls, a plain verdict.",
    epilog=o.examples("regrad compare", "regrad plugins list", "regrad COMMAND --help"),
    cls=o.PlainGroup,
    pretty_exceptions_enable=False,
)
app.add_typer(plugins, name="plugins")


@app.command(
    cls=o.ManyValues,
    epilog=o.examples(
        "regrad compare --corrections xgrad agc xgrad+agc --lr 0.02,0.05,0.1",
        "regrad compare --workload imagefolder --data-dir DIR --seeds 6",
        "regrad compare --resume --out DIR --seeds 12",
    ),
)
def compare(
    ctx: typer.Context,
    *,
    corrections: o.Corrections = None,
    no_controls: Annotated[
        bool, o.flag("Leave out the trivial changes to beat.", o.WHAT, "--no-controls", metavar=" ")
    ] = False,
    seeds: Annotated[
        int | None, o.flag("Paired runs of each arm; 10 by default.", o.WHAT, metavar="N")
    ] = None,
    workload: o.WorkloadName = None,
    data_dir: o.DataDir = None,
    download: o.Download = None,
    image_size: o.ImageSize = None,
    train_size: o.TrainSize = None,
    model: o.Model = None,
    width: o.Width = None,
    norm: o.Norm = None,
    lr: Annotated[
        str | None, o.flag("Learning rate; of several each arm chooses.", o.HOW, metavar="X,X")
    ] = None,
    tuning_seeds: Annotated[
        int | None, o.flag("Runs per rate in that choice; 2 by default.", o.HOW, metavar="N")
    ] = None,
    probe_every: o.ProbeEvery = None,
    probe_size: o.ProbeSize = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    optimizer: o.Optimizer = None,
    warmup_steps: o.WarmupSteps = None,
    accumulate: o.Accumulate = None,
    mixed_precision: o.MixedPrecision = None,
    clip_norm: o.ClipNorm = None,
    evaluations_per_epoch: o.Evaluations = None,
    threads: o.Threads = None,
    processes: o.Processes = None,
    workers: o.Workers = None,
    jobs: o.Jobs = None,
    tracker: o.TrackerKind = None,
    tracking_uri: o.TrackingUri = None,
    config: o.ConfigFile = None,
    out: o.Out = None,
    resume: o.Resume = False,
    cells: o.Cells = False,
    cell: o.CellNumber = None,
    json: o.AsJson = False,
) -> int:
    """Compare corrections with the baseline and with the trivial changes they must beat.

    Without flags: powergrad, xgrad and both, with their controls, on handwritten digits, 10 seeds. Numbers for which
    no default is named suit the workload.
    """
    console = _console()
    with checking_input(), console.status(CHECKING):
        from regrad_runner.comparing.plan import make_plan  # noqa: PLC0415
        from regrad_runner.settings.config import CompareConfig  # noqa: PLC0415

        o.at_most_one({"--jobs": jobs is not None, "--cell": cell is not None, "--cells": cells})
        o.check_out(out)
        settings = _settings(CompareConfig, ctx, config, out, resume=resume or cell is not None)
        if cell is None:
            plan = make_plan(settings, out=out, resume=resume, jobs=1 if jobs is None else jobs)
    if cell is not None:
        return _run_cell(console, settings, cell, out or Path())
    with _writing(plan, resume=resume):
        if cells:
            return _prepare_cells(console, plan, as_json=json)
        return _compare(console, plan, jobs=jobs, as_json=json)


def _compare(console: Console, plan: Plan, *, jobs: int | None, as_json: bool) -> int:
    """Run a comparison and show it."""
    from regrad_runner.comparing.compare import compare as run  # noqa: PLC0415
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.reporting.report import show_comparison  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import leave_processes  # noqa: PLC0415

    display = Display(console, runs=plan.runs, quiet=not plan.reports)
    display.say(plan.in_words())
    more = f" --jobs {jobs}" if jobs else ""
    with (
        going_on(
            console, f"regrad compare --resume --out {plan.path}{more}", quiet=not plan.reports
        ),
        display,
    ):
        folder = run(plan, display)
    leave_processes()
    if plan.reports:
        show_comparison(folder.path, as_json=as_json)
    return int(any(result.status == "failed" for result in folder.results))


def _run_cell(console: Console, settings: CompareConfig, number: int, out: Path) -> int:
    """Run one cell of a job array."""
    with checking_input(), console.status(CHECKING):
        from regrad_runner.comparing.job_array import make_cell_plan, run_cell  # noqa: PLC0415
        from regrad_runner.results.locks import running_cell  # noqa: PLC0415

        cell_plan = make_cell_plan(settings, number, out)
    from regrad_runner.comparing.compare import in_words  # noqa: PLC0415
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.results.outcomes import Result  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import leave_processes  # noqa: PLC0415

    plan, name = cell_plan.plan, f"cell {number}: {cell_plan.cell.name}"
    display = Display(console, runs=1, quiet=not plan.reports)
    if cell_plan.done:
        display.say(f"{name}: it ended before")
        return 0
    with (
        _held(running_cell(plan.path, *cell_plan.cell.folder_names), wanted=plan.reports),
        going_on(console, f"regrad compare --out {out} --cell {number}", quiet=not plan.reports),
        display,
    ):
        outcome = run_cell(cell_plan, display)
        if outcome is not None:
            display.end(f"{name}: {in_words(outcome, plan.workload.measure)}")
    leave_processes()
    return int(isinstance(outcome, Result) and outcome.status == "failed")


def _prepare_cells(console: Console, plan: Plan, *, as_json: bool) -> int:
    """Make the folder of a job array and say what its cells are."""
    from regrad_runner.comparing.job_array import prepare, show_prepared  # noqa: PLC0415

    numbers = prepare(plan, say=console.print)
    if plan.reports:
        typer.echo(show_prepared(plan.path, numbers, as_json=as_json))
    return 0


@app.command(
    cls=o.ManyValues,
    epilog=o.examples(
        "regrad train --corrections xgrad powergrad --seed 3 --out DIR",
        "regrad train --resume --out DIR",
    ),
)
def train(
    ctx: typer.Context,
    *,
    corrections: o.Corrections = None,
    workload: o.WorkloadName = None,
    data_dir: o.DataDir = None,
    download: o.Download = None,
    image_size: o.ImageSize = None,
    train_size: o.TrainSize = None,
    model: o.Model = None,
    width: o.Width = None,
    norm: o.Norm = None,
    seed: Annotated[
        int | None, o.flag("Fixes weights, order, augmentation; 0 by default.", o.HOW, metavar="N")
    ] = None,
    lr: Annotated[
        float | None, o.flag("Learning rate at the start of the cosine.", o.HOW, metavar="X")
    ] = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    optimizer: o.Optimizer = None,
    warmup_steps: o.WarmupSteps = None,
    accumulate: o.Accumulate = None,
    mixed_precision: o.MixedPrecision = None,
    clip_norm: o.ClipNorm = None,
    evaluations_per_epoch: o.Evaluations = None,
    threads: o.Threads = None,
    processes: o.Processes = None,
    workers: o.Workers = None,
    checkpoint_every: Annotated[
        int | None, o.flag("Steps between them; an epoch by default.", o.WHERE, metavar="N")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, o.flag("How many stay; 2 by default.", o.WHERE, metavar="N")
    ] = None,
    tracker: o.TrackerKind = None,
    tracking_uri: o.TrackingUri = None,
    config: o.ConfigFile = None,
    out: o.Out = None,
    resume: o.Resume = False,
    json: o.AsJson = False,
) -> int:
    """Train one model, with checkpoints; --resume continues it exactly.

    Numbers for which no default is named suit the workload.
    """
    console = _console()
    with checking_input(), console.status(CHECKING):
        from regrad_runner.settings.config import TrainConfig  # noqa: PLC0415
        from regrad_runner.training_command import make_plan  # noqa: PLC0415

        o.check_out(out)
        from regrad_runner.training_command import train as run  # noqa: PLC0415

        plan = make_plan(
            _settings(TrainConfig, ctx, config, out, resume=resume), out=out, resume=resume
        )
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.reporting.report import show_run  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import leave_processes  # noqa: PLC0415

    display = Display(console, runs=1, quiet=not plan.reports)
    with (
        _writing(plan, resume=resume),
        going_on(console, f"regrad train --resume --out {plan.path}", quiet=not plan.reports),
        display,
    ):
        run(plan, display)
    leave_processes()
    if plan.reports:
        show_run(plan.path, as_json=json)
    return 0


@app.command(cls=o.Plain, epilog=o.examples("regrad report DIR", "regrad report DIR --json"))
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What compare or train wrote.", show_default=False)
    ],
    json: o.JsonAlone = False,
) -> int:
    """Show again what a comparison or run showed, and draw its figures again; nothing is trained."""
    with checking_input():
        from regrad_runner.reporting.report import show  # noqa: PLC0415

        show(folder, as_json=json)
    return 0


@app.command(cls=o.Plain, epilog=o.examples("regrad sync DIR"))
def sync(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What compare or train wrote.", show_default=False)
    ],
    tracking_uri: Annotated[
        str | None, o.flag("Another MLflow server or database to show it in.", None, metavar="URI")
    ] = None,
) -> int:
    """Show a folder in MLflow: whatever is not there yet, such as after the server was down."""
    with checking_input():
        from regrad_runner.results.sync import sync as run  # noqa: PLC0415

        done = run(folder, tracking_uri)
        for line in done.in_words(folder):
            typer.echo(line)
    return int(not done.is_complete)


@app.command(
    cls=o.ManyValues,
    epilog=o.examples(
        "regrad explain --corrections xgrad powergrad", "regrad explain --corrections all --all"
    ),
)
def explain(
    ctx: typer.Context,
    *,
    corrections: o.Corrections = None,
    workload: o.WorkloadName = None,
    data_dir: o.DataDir = None,
    download: o.Download = None,
    image_size: o.ImageSize = None,
    train_size: o.TrainSize = None,
    model: o.Model = None,
    width: o.Width = None,
    norm: o.Norm = None,
    lr: Annotated[float | None, o.flag("Learning rate.", o.HOW, metavar="X")] = None,
    batch_size: o.BatchSize = None,
    optimizer: o.Optimizer = None,
    after_steps: Annotated[
        int, o.flag("Steps to train first; 1 by default.", o.HOW, metavar="N")
    ] = 1,
    every_tensor: Annotated[
        bool, o.flag("Every tensor, not those that change most.", o.WHERE, "--all", metavar=" ")
    ] = False,
    json: o.AsJson = False,
) -> int:
    """Show what corrections would change on one batch, why, what they cost and with what they conflict."""
    with checking_input():
        from regrad_runner.diagnostics.explaining import explain as run  # noqa: PLC0415
        from regrad_runner.reporting.report import show_explanation  # noqa: PLC0415
        from regrad_runner.settings.config import TrainConfig  # noqa: PLC0415

        settings = _settings(TrainConfig, ctx, None, None, resume=False)
        explanation = run(settings, after_steps=after_steps)
    show_explanation(explanation, as_json=json, every_tensor=every_tensor)
    return 0


def _settings(
    kind: type[Config], ctx: typer.Context, file: Path | None, out: Path | None, *, resume: bool
) -> Config:
    """Read the settings: from the file and the flags, and of a run to resume from its folder."""
    from regrad_runner.settings.loading import load_config  # noqa: PLC0415

    if resume and out is None:
        raise ValueError("out must be given with --resume: the folder to continue")
    if resume and out is not None and file is None:
        file = out / "config.yaml"
        if not file.is_file():
            start = "; start it again without --resume" if out.is_dir() else ""
            what = f"out must be the folder of an earlier run to resume it, got '{out}' without config.yaml"
            raise ValueError(f"{what}{start}")
    return load_config(kind, file=file, flags=o.settings_of(ctx))


@contextmanager
def _writing(plan: Plan | TrainPlan, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a plan, which may have changed since it was checked."""
    from regrad_runner.reporting.report import check_whole  # noqa: PLC0415
    from regrad_runner.results.folder import check_unchanged  # noqa: PLC0415
    from regrad_runner.results.locks import writing  # noqa: PLC0415

    def check() -> None:
        check_unchanged(plan.path, plan.config, resume=resume)
        if resume:
            check_whole(plan.path)

    with _held(writing(plan.path), wanted=plan.reports, check=check):
        yield


@contextmanager
def _held(
    lock: AbstractContextManager[None],
    *,
    wanted: bool,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold a lock while the block runs: who cannot have it gets one line, before anything is written.

    Args:
        lock: From `regrad_runner.results.locks`.
        wanted: Whether this is the process that writes.
        check: Called with the lock held, may raise what `checking_input` turns into a line.
    """
    with ExitStack() as held:
        if wanted:
            with checking_input():
                held.enter_context(lock)
                check()
        yield


def _console() -> Console:
    """Return where progress goes: not where results go, which may be piped to a program."""
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    return Terminal(stderr=True)
