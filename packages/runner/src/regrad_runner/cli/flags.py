"""The flags that several commands share, and how their values reach the settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from regrad_runner.cli import completion

WHAT, HOW, WHERE = "What is trained", "How it is trained", "Where it goes"
NOT_SETTINGS = {
    "config",
    "out",
    "resume",
    "json",
    "after_steps",
    "every_tensor",
    "jobs",
    "cell",
    "cells",
}
LONGEST_SHOWN = 100
MANY = {"--corrections": "--corrections", "--correction": "--corrections"}


def flag(
    text: str, panel: str | None, *names: str, metavar: str | None = None, offers: Any = None
) -> Any:
    """Return an option without a default of its own: that is in the settings, and `text` says it."""
    shown: dict[str, Any] = {"rich_help_panel": panel, "metavar": metavar, "show_default": False}
    return typer.Option(*names, help=text, autocompletion=offers, **shown)


def examples(*lines: str) -> str:
    """Return what stands below a command's help; every line is parsed by a test."""
    return "\n\n".join(("Examples:", *lines))


WorkloadName = Annotated[
    str | None,
    flag("Data to learn; digits by default.", WHAT, metavar="NAME", offers=completion.workloads),
]
DataDir = Annotated[
    str | None, flag("Folder or file with the data, if it needs one.", WHAT, metavar="PATH")
]
Download = Annotated[
    bool | None, flag("Fetch published data that are not there.", WHAT, "--download", metavar=" ")
]
ImageSize = Annotated[int | None, flag("Pixels to give images of many sizes.", WHAT, metavar="N")]
TrainSize = Annotated[
    int | None, flag("Training samples to keep; all by default.", WHAT, metavar="N")
]
Model = Annotated[
    str | None,
    flag("resnet8, gpt, or one of torchvision.", WHAT, metavar="NAME", offers=completion.models),
]
Width = Annotated[int | None, flag("Channels of the first stage, or of a gpt.", WHAT, metavar="N")]
Norm = Annotated[str | None, flag("batch (the default), group or none.", WHAT, metavar="NORM")]
Epochs = Annotated[int | None, flag("Passes over the training samples.", HOW, metavar="N")]
BatchSize = Annotated[int | None, flag("Samples per step, over all processes.", HOW, metavar="N")]
Optimizer = Annotated[
    str | None,
    flag("Such as adamw, or sgd:nesterov=true.", HOW, metavar="NAME", offers=completion.optimizers),
]
WarmupSteps = Annotated[
    int | None, flag("Steps in which the learning rate rises.", HOW, metavar="N")
]
Accumulate = Annotated[
    int | None, flag("Parts of a batch, one after the other; 1 by default.", HOW, metavar="N")
]
MixedPrecision = Annotated[
    str | None, flag("no (the default), bf16 or fp16.", HOW, metavar="FORMAT")
]
ClipNorm = Annotated[
    float | None, flag("Largest gradient norm; none by default.", HOW, metavar="X")
]
Evaluations = Annotated[int | None, flag("Looks at the validation split.", HOW, metavar="N")]
ProbeEvery = Annotated[
    int | None, flag("Steps between probes of gradient quality; none by default.", HOW, metavar="N")
]
ProbeSize = Annotated[
    int | None, flag("Samples of a probe's large batch; 2048 by default.", HOW, metavar="N")
]
Threads = Annotated[int | None, flag("CPU threads of each process.", HOW, metavar="N")]
Processes = Annotated[
    int | None, flag("Fail unless as many processes were launched.", HOW, metavar="N")
]
Workers = Annotated[
    int | None, flag("Processes that make samples; 0 by default.", HOW, metavar="N")
]
TrackerKind = Annotated[
    str | None, flag("mlflow (the default) or none.", WHERE, "--tracker", metavar="KIND")
]
TrackingUri = Annotated[
    str | None, flag("MLflow server; else a database in the folder.", WHERE, metavar="URI")
]
ConfigFile = Annotated[
    Path | None, flag("YAML file with these settings; flags win.", WHERE, metavar="FILE")
]
Out = Annotated[
    Path | None, flag("Folder to write; a new one here by default.", WHERE, metavar="DIR")
]
Resume = Annotated[bool, flag("Go on with what is in --out.", WHERE, "--resume", metavar=" ")]
Jobs = Annotated[int | None, flag("Runs at once, a process each; 1 by default.", HOW, metavar="N")]
CellNumber = Annotated[
    int | None, flag("Run this one of a job array's cells in --out.", WHERE, metavar="N")
]
Cells = Annotated[
    bool, flag("Make --out, and say which cells there are.", WHERE, "--cells", metavar=" ")
]
AsJson = Annotated[
    bool, flag("Print JSON for programs instead of a table.", WHERE, "--json", metavar=" ")
]
JsonAlone = Annotated[
    bool, flag("Print JSON for programs instead of a table.", None, "--json", metavar=" ")
]
Corrections = Annotated[
    list[str] | None,
    flag(
        "Such as xgrad:horizon=2 agc; + stacks; all: every one.",
        WHAT,
        metavar="NAME...",
        offers=completion.corrections,
    ),
]


class Plain(TyperCommand):
    """A command whose help shows no type where there is no value to give."""

    help_panel: str | None = None

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters as they are shown."""
        return shown_plainly(super().get_params(ctx), self.help_panel)


class PlainGroup(TyperGroup):
    """A group of commands whose help shows no type where there is no value to give."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters as they are shown."""
        return shown_plainly(super().get_params(ctx), None)


class ManyValues(Plain):
    """A command whose `--corrections` takes every word up to the next flag."""

    help_panel = WHERE

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag in front of each of its values, which is what the parser understands."""
        words = repeat_flag(args)
        ctx.meta["offers corrections"] = "--corrections" in words[-2:]
        rest: list[str] = super().parse_args(ctx, words)
        return rest

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Offer more corrections behind the first one."""
        flag_begins = incomplete.startswith("-")
        if flag_begins or not ctx.meta.get("offers corrections"):
            return super().shell_complete(ctx, incomplete)
        (wanted,) = (parameter for parameter in self.params if parameter.name == "corrections")
        return wanted.shell_complete(ctx, incomplete)


def shown_plainly(parameters: Iterable[Any], help_panel: str | None) -> list[Any]:
    """Take the type from what is shown of flags without a value, and give `--help` its panel."""
    changed = list(parameters)
    for parameter in changed:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = parameter.metavar or " "
        if parameter.name == "help":
            parameter.rich_help_panel = help_panel
    return changed


def repeat_flag(words: Sequence[str]) -> list[str]:
    """Put `--corrections` in front of each of its values; `--correction` is the same flag.

    Example:
        >>> repeat_flag(["--corrections", "agc", "xgrad", "--seeds", "3"])
        ['--corrections', 'agc', '--corrections', 'xgrad', '--seeds', '3']
        >>> repeat_flag(["--correction=agc", "xgrad"])
        ['--corrections', 'agc', '--corrections', 'xgrad']
    """
    repeated: list[str] = []
    name, values = "", 0
    for word in _apart(words):
        if word.startswith("-"):
            name, values = MANY.get(word, ""), 0
        elif name:
            values += 1
            if values > 1:
                repeated.append(name)
        repeated.append(MANY.get(word, word))
    return repeated


def _apart(words: Sequence[str]) -> Iterator[str]:
    """Yield words, the flag and the first value of `--corrections=agc` one after the other."""
    for word in words:
        flag_name, equals, value = word.partition("=")
        if equals and flag_name in MANY:
            yield from (flag_name, value)
        else:
            yield word


def settings_of(context: typer.Context) -> dict[str, Any]:
    """Return the flags that were given and are settings, by name. A list that was not given comes as an empty one."""
    given = {
        name: value
        for name, value in context.params.items()
        if value is not None and value not in ([], ())
    }
    flags = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
    if flags.pop("no_controls", False):
        flags["controls"] = False
    if isinstance(flags.get("lr"), str):
        flags["lr"] = flags["lr"].split(",")
    return flags


def check_out(out: Path | None) -> None:
    """Raise a `ValueError` for a folder's name that no file system takes, before anything is loaded."""
    if out is None:
        return
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        name = str(out) if len(str(out)) <= LONGEST_SHOWN else f"{str(out)[:LONGEST_SHOWN]}…"
        raise ValueError(
            f"out must be a folder, got {name!r}: {why}; choose another name"
        ) from None


def at_most_one(given: Mapping[str, bool]) -> None:
    """Raise a `ValueError` if more than one of these flags was given."""
    both = [name for name, was_given in given.items() if was_given]
    if len(both) > 1:
        raise ValueError(f"{both[0]} must be given without {both[1]}")
