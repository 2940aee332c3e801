"""The command `regrad run`. What is heavy is imported when it is used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from regrad_runner.cli.completion import corrections as offered_corrections
from regrad_runner.cli.flags import flag, switch
from regrad_runner.errors import checking_input
from regrad_runner.settings.flag import HOW_IT_IS_TRAINED, WHAT_IS_TRAINED, WHERE_IT_GOES

RUN_EXAMPLES = (
    "regrad run --corrections xgrad agc -- train.py --lr 0.001",
    "regrad run --corrections powergrad --seed 3 -- -m package.train",
)
PLAIN_FORMAT = warnings.formatwarning


def run_command(
    script: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- SCRIPT ARGS...",
            help="As you would give it to python, or '-m MODULE ARGS...'.",
            show_default=False,
        ),
    ] = None,
    *,
    corrections: Annotated[
        list[str] | None,
        flag(
            "For example xgrad:horizon=2 agc; attached together, in this order.",
            WHAT_IS_TRAINED,
            metavar="NAME...",
            completion=offered_corrections,
        ),
    ] = None,
    control: Annotated[
        str | None,
        flag("Apply a control instead, such as nesterov.", WHAT_IS_TRAINED, metavar="NAME"),
    ] = None,
    control_of: Annotated[
        list[str] | None,
        flag(
            "Apply this correction's control instead; may be repeated.",
            WHAT_IS_TRAINED,
            metavar="NAME",
            completion=offered_corrections,
        ),
    ] = None,
    optimizer_class: Annotated[
        list[str] | None,
        flag(
            "Correct only optimizers of this class; may be repeated.",
            WHAT_IS_TRAINED,
            metavar="NAME",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        flag(
            "Seed Python, NumPy and torch before the script starts.", HOW_IT_IS_TRAINED, metavar="N"
        ),
    ] = None,
    shift_seeds: Annotated[
        bool,
        switch(
            "Add 1000 times --seed to seeds that the script sets.",
            HOW_IT_IS_TRAINED,
            "--shift-seeds",
        ),
    ] = False,
    receipt: Annotated[
        Path | None, flag("File for the receipts, as JSON.", WHERE_IT_GOES, metavar="FILE")
    ] = None,
    trace: Annotated[
        bool, switch("Say when and why each optimizer is attached.", WHERE_IT_GOES, "--trace")
    ] = False,
) -> int:
    """Run a training script, unmodified, with corrections.

    Optimizers are found when they are created, models when they are called. At the end it reports
    what was corrected. Exit code: the script's own, or 3 if nothing was attached.
    """
    with checking_input():
        from regrad_runner.scripts.command import ScriptRun, check, run  # noqa: PLC0415

        words = tuple(script or ())
        names = tuple(corrections or ())
        if not words and any(name.endswith(".py") for name in names):
            raise ValueError(f"script must come after '--', got --corrections {' '.join(names)}")
        given = ScriptRun(
            words=words,
            corrections=names,
            control=control,
            control_of=tuple(control_of or ()),
            optimizer_classes=tuple(optimizer_class or ()),
            seed=seed,
            shifts_seeds=shift_seeds,
            receipt=receipt,
            traces=trace,
        )
        check(given)
    warnings.formatwarning = PLAIN_FORMAT  # the script's warnings look as they always do
    return run(given)
