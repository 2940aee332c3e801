"""The command `regrad explain`. What is heavy is imported when it is used."""

from __future__ import annotations

from typing import Annotated, Any

from regrad_runner.cli.flags import Json, flag, switch
from regrad_runner.cli.settings_flags import load_settings, takes_settings
from regrad_runner.errors import checking_input
from regrad_runner.settings.config import TrainConfig
from regrad_runner.settings.flag import HOW_IT_IS_TRAINED, WHERE_IT_GOES

EXPLAIN_EXAMPLES = (
    "regrad explain --corrections xgrad powergrad",
    "regrad explain --corrections all --all",
)
EXPLAINED_SETTINGS = (
    "corrections",
    "workload",
    "data_dir",
    "download",
    "image_size",
    "train_size",
    "model",
    "width",
    "norm",
    "lr",
    "batch_size",
    "optimizer",
)


@takes_settings(TrainConfig, names=EXPLAINED_SETTINGS)
def explain_command(
    given: dict[str, Any],
    *,
    after_steps: Annotated[
        int, flag("Steps to train first; 1 by default.", HOW_IT_IS_TRAINED, metavar="N")
    ] = 1,
    every_tensor: Annotated[
        bool, switch("Show every tensor, not only the most changed.", WHERE_IT_GOES, "--all")
    ] = False,
    json: Json = False,
) -> int:
    """Show what corrections would change on one batch, why, at what cost, and their conflicts."""
    with checking_input():
        from regrad_runner.diagnostics.explaining import explain  # noqa: PLC0415
        from regrad_runner.reporting.report import show_explanation  # noqa: PLC0415

        settings = load_settings(TrainConfig, given)
        explanation = explain(settings, after_steps=after_steps)
    show_explanation(explanation, as_json=json, every_tensor=every_tensor)
    return 0
