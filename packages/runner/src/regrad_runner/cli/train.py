"""The command `regrad train`. What is heavy is imported when it is used."""

from __future__ import annotations

from typing import Any

from regrad_runner.cli.flags import ConfigFile, Json, Out, Resume
from regrad_runner.cli.holding import holding_folder
from regrad_runner.cli.settings_flags import CHECKING, load_settings, takes_settings
from regrad_runner.errors import checking_input
from regrad_runner.settings.config import TrainConfig

TRAIN_EXAMPLES = (
    "regrad train --corrections xgrad powergrad --seed 3 --out DIR",
    "regrad train --resume --out DIR",
)


@takes_settings(TrainConfig)
def train_command(
    given: dict[str, Any],
    *,
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
) -> int:
    """Train one model, with checkpoints; --resume continues it exactly.

    A number without a default here depends on the workload.
    """
    from regrad_runner.terminal import Terminal  # noqa: PLC0415

    console = Terminal(stderr=True)  # results go to stdout, perhaps into another program
    with checking_input(), console.status(CHECKING):
        from regrad_runner.tracking.choosing import check_tracker  # noqa: PLC0415
        from regrad_runner.training_command import make_training_plan, train  # noqa: PLC0415

        settings = load_settings(TrainConfig, given, config=config, out=out, resume=resume)
        check_tracker(settings, given, resume=resume)
        plan = make_training_plan(settings, out=out, resume=resume)
    from regrad_runner.reporting.progress import Display  # noqa: PLC0415
    from regrad_runner.reporting.report import show_run  # noqa: PLC0415
    from regrad_runner.training.interrupting import going_on  # noqa: PLC0415
    from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

    display = Display(console, runs=1, quiet=not plan.reports)
    again = f"regrad train --resume --out {plan.path}"
    with (
        holding_folder(plan, resume=resume),
        going_on(console, again, quiet=not plan.reports),
        display,
    ):
        train(plan, display)
    destroy_process_group()
    if plan.reports:
        show_run(plan.path, as_json=json)
    return 0
