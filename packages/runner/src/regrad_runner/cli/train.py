"""The command `regrad train`. What is heavy is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regrad_runner.cli.flags import ConfigFile, Json, Out
from regrad_runner.cli.holding import holding_folder
from regrad_runner.cli.resuming import Resume, Resuming, read_resume
from regrad_runner.cli.settings_flags import CHECKING, load_settings, takes_settings
from regrad_runner.errors import checking_input
from regrad_runner.settings.config import TrainConfig

if TYPE_CHECKING:
    from regrad_runner.terminal import Terminal
    from regrad_runner.training_command import TrainingPlan

TRAIN_EXAMPLES = (
    "regrad train --corrections xgrad powergrad --seed 3 --out DIR",
    "regrad train --resume --out DIR",
    "regrad train --resume auto --corrections xgrad --out DIR",
)


@takes_settings(TrainConfig)
def train_command(
    given: dict[str, Any],
    *,
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = None,
    json: Json = False,
) -> int:
    """Train one model, with checkpoints; --resume continues it exactly.

    With --resume auto one command, with all its flags, starts the run and restarts it.

    A number without a default here depends on the workload.
    """
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    console = Terminal(stderr=True)  # results go to stdout, perhaps into another program
    with checking_input(), console.status(CHECKING):
        from regrad_runner.tracking.choosing import check_tracker  # noqa: PLC0415
        from regrad_runner.training_command import make_training_plan  # noqa: PLC0415

        resuming = read_resume(resume, out=out)
        settings = load_settings(
            TrainConfig, given, config=config, out=out, resume=resuming.takes_settings
        )
        check_tracker(settings, given, resume=resuming.takes_settings)
        plan = make_training_plan(settings, out=out, resume=resuming.continues)
    from regrad_runner.reporting.report import show_run  # noqa: PLC0415
    from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

    if resuming.is_automatic and plan.is_finished:
        _leave_finished(console, plan, resuming)
    else:
        _train(console, plan, resuming)
    destroy_process_group()
    if plan.reports:
        show_run(plan.path, as_json=json)
    return 0


def _train(console: Terminal, plan: TrainingPlan, resuming: Resuming) -> None:
    """Train, or continue, with the folder held."""
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training_command import train  # noqa: PLC0415

    display = Display(console, runs=1, quiet=not plan.reports)
    again = f"regrad train --resume --out {plan.path}"
    with (
        holding_folder(plan, resuming),
        going_on(console, again, quiet=not plan.reports),
        display,
    ):
        train(plan, display)


def _leave_finished(console: Terminal, plan: TrainingPlan, resuming: Resuming) -> None:
    """Say that nothing is left to train, and write the tables, which a kill may have left out."""
    from regrad_runner.reporting.report import export_tables  # noqa: PLC0415
    from regrad_runner.results.folder import ResultsFolder  # noqa: PLC0415

    if not plan.reports:
        return
    with holding_folder(plan, resuming):
        export_tables(ResultsFolder(plan.path))
    console.print_line(f"the run in {plan.path} has finished; nothing is left to train")
