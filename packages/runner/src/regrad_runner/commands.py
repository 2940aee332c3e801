"""The commands: from flags to plans, from results to the screen. What is heavy is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Annotated

import typer

from regrad_runner import options as o
from regrad_runner.errors import checking_input

if TYPE_CHECKING:
    from rich.console import Console

    from regrad_runner.config import Config

CHECKING = "checking settings, data and corrections"

app = typer.Typer(
    name="regrad",
    help="Compare gradient corrections on your data: paired seeds, controls, a plain verdict.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
plugins = typer.Typer(help="What is installed.", no_args_is_help=True)
app.add_typer(plugins, name="plugins")


@app.command(cls=o.ManyValues)
def compare(
    ctx: typer.Context,
    *,
    corrections: o.Corrections = None,
    no_controls: Annotated[
        bool, o.flag("Leave out the changes to beat.", o.WHAT, "--no-controls", metavar=" ")
    ] = False,
    seeds: Annotated[int | None, o.flag("Paired runs of each arm.", o.WHAT, metavar="N")] = None,
    workload: o.WorkloadName = None,
    data_dir: o.DataDir = None,
    download: o.Download = None,
    image_size: o.ImageSize = None,
    train_size: o.TrainSize = None,
    model: o.Model = None,
    width: o.Width = None,
    norm: o.Norm = None,
    lr: Annotated[str | None, o.flag("Of several every arm chooses one.", o.HOW, metavar="X,X…")] = None,
    tuning_seeds: Annotated[int | None, o.flag("Runs per rate and arm in that choice.", o.HOW, metavar="N")] = None,
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
    tracker: o.TrackerKind = None,
    tracking_uri: o.TrackingUri = None,
    config: o.ConfigFile = None,
    out: o.Out = None,
    resume: o.Resume = False,
    json: o.AsJson = False,
) -> int:
    """Compare corrections with the baseline and with the trivial changes they must beat.

    Without flags: powergrad, xgrad and both, with their controls, on handwritten digits, 10 seeds.
    """
    console = _console()
    with checking_input(), console.status(CHECKING):
        from regrad_runner.compare import compare as run  # noqa: PLC0415
        from regrad_runner.compare import make_plan  # noqa: PLC0415
        from regrad_runner.config import CompareConfig  # noqa: PLC0415

        plan = make_plan(_settings(CompareConfig, ctx, config, out, resume=resume), out=out, resume=resume)
    from regrad_runner.preparation import leave_processes  # noqa: PLC0415
    from regrad_runner.progress import Display  # noqa: PLC0415
    from regrad_runner.report import show_comparison  # noqa: PLC0415

    display = Display(console, runs=plan.runs, quiet=not plan.reports)
    display.say(plan.in_words())
    with _going_on(console, f"regrad compare --resume --out {plan.path}", quiet=not plan.reports), display:
        folder = run(plan, display)
    leave_processes()
    if plan.reports:
        show_comparison(folder.path, as_json=json)
    return int(any(result.status == "failed" for result in folder.results))


@app.command(cls=o.ManyValues)
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
    seed: Annotated[int | None, o.flag("Of weights, order and augmentation.", o.HOW, metavar="N")] = None,
    lr: Annotated[float | None, o.flag("Learning rate before the cosine.", o.HOW, metavar="X")] = None,
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
    checkpoint_every: Annotated[int | None, o.flag("Steps; an epoch by default.", o.WHERE, metavar="N")] = None,
    keep_checkpoints: Annotated[int | None, o.flag("How many stay; 2 by default.", o.WHERE, metavar="N")] = None,
    tracker: o.TrackerKind = None,
    tracking_uri: o.TrackingUri = None,
    config: o.ConfigFile = None,
    out: o.Out = None,
    resume: o.Resume = False,
    json: o.AsJson = False,
) -> int:
    """Train one model, with checkpoints; --resume continues it exactly."""
    console = _console()
    with checking_input(), console.status(CHECKING):
        from regrad_runner.config import TrainConfig  # noqa: PLC0415
        from regrad_runner.train import make_plan  # noqa: PLC0415
        from regrad_runner.train import train as run  # noqa: PLC0415

        plan = make_plan(_settings(TrainConfig, ctx, config, out, resume=resume), out=out, resume=resume)
    from regrad_runner.preparation import leave_processes  # noqa: PLC0415
    from regrad_runner.progress import Display  # noqa: PLC0415
    from regrad_runner.report import show_run  # noqa: PLC0415

    display = Display(console, runs=1, quiet=not plan.reports)
    with _going_on(console, f"regrad train --resume --out {plan.path}", quiet=not plan.reports), display:
        run(plan, display)
    leave_processes()
    if plan.reports:
        show_run(plan.path, as_json=json)
    return 0


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What compare or train wrote.", show_default=False)],
    json: o.AsJson = False,
) -> int:
    """Show again what a comparison or run showed, and draw its figures again; nothing is trained."""
    with checking_input():
        from regrad_runner.report import show  # noqa: PLC0415

        show(folder, as_json=json)
    return 0


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What compare or train wrote.", show_default=False)],
) -> int:
    """Deliver what tracking could not send while the server was down; runs that were killed are marked so."""
    with checking_input():
        from regrad_runner.sync import sync as run  # noqa: PLC0415

        done = run(folder)
    for line in done.in_words(folder):
        typer.echo(line)
    return int(done.waiting > 0)


@app.command(cls=o.ManyValues)
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
    after_steps: Annotated[int, o.flag("Steps to train first: some corrections need one.", o.HOW, metavar="N")] = 1,
    every_tensor: Annotated[bool, o.flag("Show every tensor.", o.WHERE, "--all", metavar=" ")] = False,
    json: o.AsJson = False,
) -> int:
    """Show what corrections would change on one batch, why, what they cost and with what they conflict."""
    with checking_input():
        from regrad_runner.config import TrainConfig  # noqa: PLC0415
        from regrad_runner.explain import explain as run  # noqa: PLC0415
        from regrad_runner.report import show_explanation  # noqa: PLC0415

        settings = _settings(TrainConfig, ctx, None, None, resume=False)
        explanation = run(settings, after_steps=after_steps)
    show_explanation(explanation, as_json=json, every_tensor=every_tensor)
    return 0


@plugins.command("list")
def list_plugins(json: o.AsJson = False) -> int:
    """List corrections, optimizers and workloads that are installed."""
    from regrad_runner.plugins import show_plugins  # noqa: PLC0415

    show_plugins(as_json=json)
    return 0


@plugins.command("show")
def show_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As plugins list has it.", show_default=False)],
    json: o.AsJson = False,
) -> int:
    """Show what a plugin does, its options, where it acts and what it must beat."""
    with checking_input():
        from regrad_runner.plugin_details import show_plugin as show  # noqa: PLC0415

        show(name, as_json=json)
    return 0


@plugins.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A correction or optimizer.", show_default=False)],
    suite: Annotated[Path | None, typer.Option(metavar="FILE", help="Its suites, if not its own tests.")] = None,
    json: o.AsJson = False,
) -> int:
    """Prove, clause by clause, that an installed plugin keeps what corrections promise."""
    from regrad_runner.checks import run_check, show_check  # noqa: PLC0415

    with checking_input(), _console().status(f"checking {name}: about half a minute"):
        report = run_check(name, suite)
    return show_check(report, as_json=json)


def _settings(kind: type[Config], ctx: typer.Context, file: Path | None, out: Path | None, *, resume: bool) -> Config:
    """Read the settings: from the file and the flags, and of a run to resume from its folder."""
    from regrad_runner.config import load_config  # noqa: PLC0415

    if resume and out is None:
        raise ValueError("out must be given with --resume: the folder to continue")
    if resume and out is not None and file is None:
        file = out / "config.yaml"
        if not file.is_file():
            start = "; start it again without --resume" if out.is_dir() else ""
            what = f"out must be the folder of an earlier run to resume it, got '{out}' without config.yaml"
            raise ValueError(f"{what}{start}")
    return load_config(kind, file=file, flags=o.settings_of(ctx))


def _console() -> Console:
    """Return where progress goes: not where results go, which may be piped to a program."""
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=True)


@contextmanager
def _going_on(console: Console, again: str, *, quiet: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what is under way as killed, and say how to go on."""
    from regrad_runner.preparation import leave_processes  # noqa: PLC0415
    from regrad_runner.stopping import stoppable, stopped_together  # noqa: PLC0415

    try:
        with stoppable():
            yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if not quiet:
            console.print(f"stopped; this goes on from here: {again}", highlight=False, markup=False, soft_wrap=True)
        if stopped_together():
            clear_frames(stop.__traceback__)  # they hold the model
            leave_processes()
        raise
