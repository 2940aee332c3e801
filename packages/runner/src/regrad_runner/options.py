"""The flags that several commands share, and how their values reach the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

WHAT, HOW, WHERE = "What is trained", "How it is trained", "Where it goes"
NOT_SETTINGS = {"config", "out", "resume", "json", "after_steps", "every_tensor", "jobs", "cell", "cells"}
MANY = {"--corrections": "--corrections", "--correction": "--corrections"}


def flag(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    """Return an option without a default of its own: that is in the settings."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


WorkloadName = Annotated[str | None, flag("digits (the default), cifar10, text, …", WHAT, metavar="NAME")]
DataDir = Annotated[str | None, flag("Folder or file with the data.", WHAT, metavar="PATH")]
Download = Annotated[bool | None, flag("Fetch the data if they are not there.", WHAT, "--download", metavar=" ")]
ImageSize = Annotated[int | None, flag("Pixels to give images of many sizes.", WHAT, metavar="N")]
TrainSize = Annotated[int | None, flag("Training samples (images, windows) to keep.", WHAT, metavar="N")]
Model = Annotated[str | None, flag("resnet8, 20, 32, 56, torchvision's, or gpt.", WHAT, metavar="NAME")]
Width = Annotated[int | None, flag("Channels of the first stage, or of a gpt.", WHAT, metavar="N")]
Norm = Annotated[str | None, flag("batch, group (mixes no samples) or none.", WHAT, metavar="NORM")]
Epochs = Annotated[int | None, flag("Passes over the training samples.", HOW, metavar="N")]
BatchSize = Annotated[int | None, flag("Samples per step, over all processes.", HOW, metavar="N")]
Optimizer = Annotated[str | None, flag("Such as sgd:momentum=0.9, or adamw.", HOW, metavar="NAME")]
WarmupSteps = Annotated[int | None, flag("Steps in which the learning rate rises.", HOW, metavar="N")]
Accumulate = Annotated[int | None, flag("Parts that a batch is worked through in.", HOW, metavar="N")]
MixedPrecision = Annotated[str | None, flag("no, bf16 or fp16.", HOW, metavar="FORMAT")]
ClipNorm = Annotated[float | None, flag("Largest gradient norm; none by default.", HOW, metavar="X")]
Evaluations = Annotated[int | None, flag("Looks at the validation split.", HOW, metavar="N")]
ProbeEvery = Annotated[int | None, flag("Steps between looks at gradient quality.", HOW, metavar="N")]
ProbeSize = Annotated[int | None, flag("Samples of the large batch in those looks.", HOW, metavar="N")]
Threads = Annotated[int | None, flag("CPU threads of each process.", HOW, metavar="N")]
Processes = Annotated[int | None, flag("Fail unless as many processes were launched.", HOW, metavar="N")]
Workers = Annotated[int | None, flag("Processes that read samples beside each.", HOW, metavar="N")]
TrackerKind = Annotated[str | None, flag("mlflow (the default) or none.", WHERE, "--tracker", metavar="KIND")]
TrackingUri = Annotated[str | None, flag("MLflow server; else a database in the folder.", WHERE, metavar="URI")]
ConfigFile = Annotated[Path | None, flag("YAML file with these settings; flags win.", WHERE, metavar="FILE")]
Out = Annotated[Path | None, flag("Folder to write; a new one here by default.", WHERE, metavar="DIR")]
Resume = Annotated[bool, flag("Go on in --out; corrections, seeds may be added.", WHERE, "--resume", metavar=" ")]
Jobs = Annotated[int | None, flag("Runs at once, each in a process of its own.", HOW, metavar="N")]
CellNumber = Annotated[int | None, flag("Run this one of a job array's cells in --out.", WHERE, metavar="N")]
Cells = Annotated[bool, flag("Make --out, and say which cells there are.", WHERE, "--cells", metavar=" ")]
AsJson = Annotated[bool, flag("Print JSON for programs instead of a table.", WHERE, "--json", metavar=" ")]
Corrections = Annotated[
    list[str] | None, flag("Such as xgrad:horizon=2 agc; + stacks; all: each.", WHAT, metavar="NAME...")
]


class ManyValues(TyperCommand):
    """A command whose `--corrections` takes every word up to the next flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag in front of each of its values, which is what the parser understands."""
        rest: list[str] = super().parse_args(ctx, repeat_flag(args))
        return rest


def repeat_flag(words: Sequence[str]) -> list[str]:
    """Put `--corrections` in front of each of its values; `--correction` is the same flag.

    Example:
        >>> repeat_flag(["--corrections", "agc", "xgrad", "--seeds", "3"])
        ['--corrections', 'agc', '--corrections', 'xgrad', '--seeds', '3']
    """
    repeated: list[str] = []
    name, values = "", 0
    for word in words:
        if word.startswith("-"):
            name, values = MANY.get(word, ""), 0
        elif name:
            values += 1
            if values > 1:
                repeated.append(name)
        repeated.append(MANY.get(word, word))
    return repeated


def settings_of(context: typer.Context) -> dict[str, Any]:
    """Return the flags that were given and are settings, by name. A list that was not given comes as an empty one."""
    given = {name: value for name, value in context.params.items() if value is not None and value not in ([], ())}
    flags = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
    if flags.pop("no_controls", False):
        flags["controls"] = False
    if isinstance(flags.get("lr"), str):
        flags["lr"] = flags["lr"].split(",")
    return flags


def at_most_one(given: Mapping[str, bool]) -> None:
    """Raise a `ValueError` if more than one of these flags was given."""
    both = [name for name, was_given in given.items() if was_given]
    if len(both) > 1:
        raise ValueError(f"{both[0]} must be given without {both[1]}")
