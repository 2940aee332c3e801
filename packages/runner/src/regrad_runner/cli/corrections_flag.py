"""The flag `--corrections`, which takes every word up to the next flag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from regrad_runner.cli import completion
from regrad_runner.cli.help import Plain
from regrad_runner.cli.resuming import with_resume_value
from regrad_runner.settings.flag import WHERE_IT_GOES

# What is typed, and the flag that it means.
SPELLINGS = {"--corrections": "--corrections", "--correction": "--corrections"}
IS_OFFERED = "offers corrections"


class ManyValues(Plain):
    """A command whose `--corrections` takes every word up to the next flag, and `--resume` or none.

    The parser knows only flags that take one value, or never any.
    """

    help_panel = WHERE_IT_GOES

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat `--corrections` in front of each of its values, and give `--resume` a value."""
        words = with_resume_value(repeat_flag(args))
        ctx.meta[IS_OFFERED] = "--corrections" in words[-2:]
        rest: list[str] = super().parse_args(ctx, words)
        return rest

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Offer more corrections after the first one."""
        flag_begins = incomplete.startswith("-")
        if flag_begins or not ctx.meta.get(IS_OFFERED):
            return super().shell_complete(ctx, incomplete)
        (flag,) = (parameter for parameter in self.params if parameter.name == "corrections")
        return flag.shell_complete(ctx, incomplete)


def more_corrections(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return completions in the place of a script: after `--corrections`, more of them."""
    if ctx.meta.get(IS_OFFERED):
        return completion.corrections(incomplete)
    return []


def repeat_flag(words: Sequence[str]) -> list[str]:
    """Put `--corrections` in front of each of its values; `--correction` is the same flag.

    What follows `--` is left unchanged.

    Example:
        >>> repeat_flag(["--corrections", "agc", "xgrad", "--seeds", "3"])
        ['--corrections', 'agc', '--corrections', 'xgrad', '--seeds', '3']
        >>> repeat_flag(["--correction=agc", "xgrad"])
        ['--corrections', 'agc', '--corrections', 'xgrad']
        >>> repeat_flag(["--corrections", "agc", "--", "train.py", "--correction"])
        ['--corrections', 'agc', '--', 'train.py', '--correction']
    """
    if "--" in words:
        end = list(words).index("--")
        return [*repeat_flag(words[:end]), *words[end:]]
    repeated: list[str] = []
    flag = ""
    values = 0
    for word in _with_values_apart(words):
        if word.startswith("-"):
            flag = SPELLINGS.get(word, "")
            values = 0
        elif flag:
            values += 1
            if values > 1:
                repeated.append(flag)
        repeated.append(SPELLINGS.get(word, word))
    return repeated


def _with_values_apart(words: Sequence[str]) -> Iterator[str]:
    """Yield words; of `--corrections=agc` the flag and its value one after the other."""
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag in SPELLINGS:
            yield flag
            yield value
        else:
            yield word
