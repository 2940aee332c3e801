"""How a correction's options become the arguments of its class, for readers and type checkers."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Concatenate, ParamSpec

P = ParamSpec("P")


def takes(
    options: Callable[P, object],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Tell type checkers and editors that `__init__` takes the fields of `options`.

    It changes nothing at run time: there every correction checks its options itself,
    and `inspect.signature` and `help` show them without it.

    Args:
        options: The `Options` of the class that `__init__` belongs to.

    Returns:
        A decorator for an `__init__(self, **options)`.

    Example:
        >>> from dataclasses import dataclass
        >>> from regrad import Correction
        >>> class Scale(Correction):
        ...     "Multiply every gradient by a factor."
        ...     @dataclass(frozen=True, kw_only=True)
        ...     class Options:
        ...         factor: float = 0.5
        ...     @takes(Options)
        ...     def __init__(self, **options):
        ...         super().__init__(**options)
        >>> Scale(factor=0.1)  # Scale(factr=0.1) is an error of the type checker
        Scale(factor=0.1)
    """

    def keep(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return init

    return keep


class ClassSignature:
    """A class's `__signature__`: the fields of its `Options` in place of `**options`.

    It is read from the class when somebody asks, so plugins get it for free.
    """

    def __get__(self, instance: object, owner: type[Any]) -> Signature | None:
        if instance is not None:
            return None  # only the class is called
        _, *written = inspect.signature(owner.__init__).parameters.values()
        named = [parameter for parameter in written if parameter.kind != Parameter.VAR_KEYWORD]
        if len(named) < len(written):
            names = {parameter.name for parameter in named}
            named += [option for option in _options_of(owner) if option.name not in names]
        return Signature(named)


def _options_of(owner: type[Any]) -> list[Parameter]:
    """Return the fields of a class's `Options` as keyword-only parameters with evaluated types."""
    hints = typing.get_type_hints(owner.Options)
    return [
        option.replace(
            kind=Parameter.KEYWORD_ONLY, annotation=hints.get(option.name, option.annotation)
        )
        for option in inspect.signature(owner.Options).parameters.values()
    ]
