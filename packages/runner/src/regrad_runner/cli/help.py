"""What every command's help has in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup


def examples(*lines: str) -> str:
    """Return the examples below a command's help; every line is parsed by a test."""
    return "\n\n".join(("Examples:", *lines))


class Plain(TyperCommand):
    """A command whose help shows no type where there is no value to give."""

    help_panel: str | None = None

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters as they are shown."""
        return without_switch_types(super().get_params(ctx), self.help_panel)


class PlainGroup(TyperGroup):
    """A group of commands whose help shows no type where there is no value to give."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters as they are shown."""
        return without_switch_types(super().get_params(ctx), None)


def without_switch_types(parameters: Iterable[Any], help_panel: str | None) -> list[Any]:
    """Hide the type of flags that take no value, and list `--help` under a heading.

    Args:
        parameters: Of a command. Overwritten.
        help_panel: The heading; None for the general one.

    Returns:
        The same parameters.
    """
    shown = list(parameters)
    for parameter in shown:
        if getattr(parameter, "is_flag", False) and not parameter.metavar:
            parameter.metavar = " "  # nothing would show the type
        if parameter.name == "help":
            parameter.rich_help_panel = help_panel
    return shown
