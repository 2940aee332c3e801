"""The flags of settings: built from the settings' declarations, and read back into settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from regrad_runner.cli import completion
from regrad_runner.cli.flags import flag, switch
from regrad_runner.settings.config import Config, RunConfig, Settings
from regrad_runner.settings.flag import Flag

COMPLETIONS = {
    "corrections": completion.corrections,
    "model": completion.models,
    "optimizer": completion.optimizers,
    "workload": completion.workloads,
}
CHECKING = "checking settings, data and corrections"  # shown while a command does so
LONGEST_SHOWN = 100


def takes_settings(
    *kinds: type[Settings], names: Sequence[str] = ()
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command a flag for each setting that declares one.

    The command's first parameter is a mapping: the settings that were given, by name. Its other
    parameters are flags of its own.

    Args:
        *kinds: Have the settings; what several have is declared by the first.
        names: Those that the command takes; all by default.
    """
    fields = _fields_of(kinds)
    flags = [_parameter(name, fields[name]) for name in names or fields]

    def with_flags(function: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(function, eval_str=True)
        _, *own = signature.parameters.values()

        @functools.wraps(function)
        def command(**values: Any) -> int:
            others = {parameter.name: values[parameter.name] for parameter in own}
            return function(given_settings(fields, values), **others)

        arguments = [item for item in own if item.kind is not inspect.Parameter.KEYWORD_ONLY]
        of_its_own = [item for item in own if item.kind is inspect.Parameter.KEYWORD_ONLY]
        shown = signature.replace(parameters=[*arguments, *flags, *of_its_own])
        command.__signature__ = shown  # type: ignore[attr-defined]
        return command

    return with_flags


def given_settings(fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as flags, by name.

    Args:
        fields: Of the settings, by name.
        values: What the parser made of a command's flags, by parameter. A flag that was not given
            is None; one that can be repeated is then an empty list.
    """
    given: dict[str, Any] = {}
    for name, field in fields.items():
        value = values.get(_parameter_name(name, field))
        if value is None or value in ([], ()):
            continue
        given[name] = _from_flag(field, value)
    return given


def load_settings(
    kind: type[Config],
    given: Mapping[str, Any],
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> Config:
    """Return the settings of a command, checked.

    Args:
        kind: Which settings.
        given: Those that were given as flags; they take precedence.
        config: A file with settings. To resume, the one in `out` by default.
        out: The folder to write to.
        resume: Whether to continue what is in `out`.

    Raises:
        ValueError: If a setting is unknown or out of its range, a file cannot be read, or `out` is
            not a folder that can be written to or resumed.
    """
    from regrad_runner.settings.loading import load_config  # noqa: PLC0415

    if out is not None:
        _check_name(out)
    if resume and out is None:
        raise ValueError("out must be given with --resume: the folder to continue")
    if resume and out is not None and config is None:
        config = _config_in(out)
    return load_config(kind, file=config, flags=given)


def _fields_of(kinds: Sequence[type[Settings]]) -> dict[str, FieldInfo]:
    """Return the fields that declare a flag; those that only one kind has come first.

    Fields that every command has come last.
    """
    fields: dict[str, FieldInfo] = {}
    for kind in kinds:
        for name in _own_first(kind):
            field = kind.model_fields[name]
            if any(isinstance(item, Flag) for item in field.metadata):
                fields.setdefault(name, field)
    return fields


def _own_first(kind: type[Settings]) -> list[str]:
    """Return the settings, those that only this kind has first: they matter most."""
    shared = [name for name in kind.model_fields if name in RunConfig.model_fields]
    return [*(name for name in kind.model_fields if name not in shared), *shared]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the parameter of a command that stands for a setting."""
    (declared,) = (item for item in field.metadata if isinstance(item, Flag))
    parameter = _parameter_name(name, field)
    if field.annotation is bool:
        option = switch(declared.meaning, declared.group, f"--{parameter.replace('_', '-')}")
    else:
        option = flag(
            declared.meaning,
            declared.group,
            metavar=declared.metavar,
            completion=COMPLETIONS.get(name),
        )
    return inspect.Parameter(
        parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_parsed_type(field.annotation), option],
    )


def _parameter_name(name: str, field: FieldInfo) -> str:
    """Return what a setting's flag is called: that of one which is on by default turns it off."""
    return f"no_{name}" if field.default is True else name


def _parsed_type(annotation: Any) -> Any:
    """Return the type that the parser makes of a flag's text.

    The parser reads only numbers. The settings check the rest, with better messages.
    """
    kinds = _alternatives(annotation)
    if any(get_origin(kind) is Literal for kind in kinds):  # a number or a word
        return str | None
    if tuple[str, ...] in kinds:
        return list[str] | None
    for kind in (bool, int, float):
        if kind in kinds:
            return kind | None
    return str | None


def _from_flag(field: FieldInfo, value: Any) -> Any:
    """Return a setting's value for a flag's."""
    if field.default is True:
        return not value
    if tuple[float, ...] in _alternatives(field.annotation):
        return value.split(",")
    return value


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without None."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for kind in get_args(annotation) if kind is not NoneType]
    return [annotation]


def _config_in(out: Path) -> Path:
    """Return the file with the settings of a folder to resume."""
    file = out / "config.yaml"
    if file.is_file():
        return file
    start_again = "; start it again without --resume" if out.is_dir() else ""
    raise ValueError(
        f"out must be the folder of an earlier run to resume it, got '{out}' without config.yaml"
        f"{start_again}"
    )


def _check_name(out: Path) -> None:
    """Raise a `ValueError` for a name that no file system takes, before anything is loaded."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        name = str(out)
        if len(name) > LONGEST_SHOWN:
            name = f"{name[:LONGEST_SHOWN]}…"
        raise ValueError(
            f"out must be a folder, got {name!r}: {why}; choose another name"
        ) from None
