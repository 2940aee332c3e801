"""The arms of a comparison: the baseline, the corrections, and the controls that they must beat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import regrad
import torch
from regrad.correction import Control, Correction
from regrad.registry import several_in
from torch.optim import Optimizer

BASELINE = "baseline"
# Its names in earlier versions: no arm may have them.
FORMER_BASELINE = "none"
ALL = "all"


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Attributes:
        name: As printed.
        corrections: Strings for `regrad.create`, in order.
        control: The trivial change to make, for a control arm.
        must_beat: Name of the arm with the trivial change that this one must beat, whether or
            not that arm runs; None if the corrections declare none.
        control_of: Of a control arm, the corrections that declare it, as strings for
            `regrad.create`.
    """

    name: str
    corrections: tuple[str, ...] = ()
    control: Control | None = None
    must_beat: str | None = None
    control_of: tuple[str, ...] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """What is done in this arm, as plain values.

        Arms of equal recipes give equal runs, whatever their names.
        """
        change = control_as_values(self.control or Control(name=""))
        del change["name"]
        return {**change, "corrections": [*self.corrections, *change["corrections"]]}


def control_as_values(control: Control) -> dict[str, Any]:
    """Return a control as plain values: a class by its full name, and only if there is one.

    Example:
        >>> import torch
        >>> control_as_values(Control(name="b", optimizer_class=torch.optim.SGD))["optimizer_class"]
        'torch.optim.sgd.SGD'
        >>> "optimizer_class" in control_as_values(Control(name="a"))
        False
    """
    values = asdict(control)
    kind = values.pop("optimizer_class")
    if kind is not None:
        values["optimizer_class"] = f"{kind.__module__}.{kind.__qualname__}"
    return values


def control_from_values(values: Mapping[str, Any]) -> Control:
    """Return the control that `control_as_values` wrote out.

    Raises:
        ValueError: If its class is not one of torch's optimizers: a file must not choose what is
            imported.

    Example:
        >>> import torch
        >>> control = Control(name="b", optimizer_class=torch.optim.SGD)
        >>> control_from_values(control_as_values(control)) == control
        True
    """
    known = dict(values)
    kind = known.get("optimizer_class")
    if kind is not None:
        known["optimizer_class"] = _optimizer_class(kind)
    known["corrections"] = tuple(known.get("corrections", ()))
    return Control(**known)


def _optimizer_class(name: str) -> type[Optimizer]:
    """Return one of torch's optimizers by its full name."""
    module, _, short = name.rpartition(".")
    kind = getattr(torch.optim, short, None)
    if kind is None or getattr(kind, "__module__", "") != module:
        raise ValueError(f"optimizer_class must be one of torch.optim, got {name!r}")
    return kind  # type: ignore[no-any-return]


def expand(corrections: Sequence[str], optimizer: Optimizer, *, controls: bool = True) -> list[Arm]:
    """Return the arms: the baseline, one per string, then their controls, equal controls once.

    A control that is already an arm, such as clipping by the norm, is not added again.

    Args:
        corrections: One string per arm, as for `regrad.create`; "+" stacks corrections.
        optimizer: What the arms train with: a control depends on it.
        controls: Whether to add controls.

    Raises:
        ValueError: If a correction cannot be created, or two arms would be the same.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> [arm.name for arm in expand([], sgd)]
        ['baseline']
    """
    arms = correction_arms(corrections)
    changes: dict[str, Control] = {}
    for arm in arms:
        change = control_of_stack(arm.corrections, optimizer)
        if change is not None:
            changes[arm.name] = change
    return with_controls(arms, changes, added=controls)


def correction_arms(corrections: Sequence[str]) -> list[Arm]:
    """Return the baseline and one arm per string.

    Args:
        corrections: As for `expand`.

    Raises:
        ValueError: If a correction cannot be created, or two arms would be the same.
    """
    arms = {BASELINE: Arm(BASELINE)}
    stacks: dict[str, list[Correction]] = {}
    for text in corrections:
        parts = parts_of(text)
        name = "+".join(parts)
        _check_name_is_free(name, arms)
        stack = list(chain.from_iterable(created(part) for part in parts))
        _check_differs(name, stack, stacks)
        stacks[name] = stack
        arms[name] = Arm(name, corrections=parts)
    return list(arms.values())


def with_controls(arms: Sequence[Arm], changes: Mapping[str, Control], *, added: bool) -> list[Arm]:
    """Return arms with what each of them must beat, followed by the controls.

    Args:
        arms: The baseline and the corrections.
        changes: The control that an arm's corrections declare together, by the name of the arm.
        added: Whether to add controls that are not arms yet.
    """
    known = {arm.name: arm for arm in arms}
    new: dict[str, Arm] = {}
    for name, change in changes.items():
        if _repeats(change, known[name].corrections):
            continue
        control = _control_arm(change, known[name], [*known.values(), *new.values()])
        known[name] = replace(known[name], must_beat=control.name)
        if control.name not in known:
            new[control.name] = control
    return [*known.values(), *new.values()] if added else list(known.values())


def _check_name_is_free(name: str, arms: Mapping[str, Arm]) -> None:
    """Raise a `ValueError` if an arm has the name of the baseline or of an arm before it."""
    if name in (BASELINE, FORMER_BASELINE):
        raise ValueError(
            f"corrections must not name the baseline, got {name!r}; it runs anyway: leave it out"
        )
    if name in arms:
        raise ValueError(f"corrections must be different, got {name!r} twice")


def _check_differs(
    name: str, stack: Sequence[Correction], stacks: Mapping[str, Sequence[Correction]]
) -> None:
    """Raise a `ValueError` if an arm does the same as one before it.

    Args:
        name: Of the arm.
        stack: Its corrections.
        stacks: Those of the arms before it, by their names.
    """
    for other, known in stacks.items():
        if _recipes(known) == _recipes(stack):
            raise ValueError(
                f"corrections must be different, got {other!r} and {name!r}, which are the same"
            )


def parts_of(text: str) -> tuple[str, ...]:
    """Split "a+b:option=1" at each plus that does not belong to a number.

    Raises:
        ValueError: If a part is empty, or names several corrections.
    """
    parts = tuple(part.strip() for part in re.split(r"(?<![0-9.][eE])\+", text))
    if not all(parts):
        raise ValueError(f"corrections must name one correction on each side of '+', got {text!r}")
    for part in parts:
        _check_alone(part)
    return parts


def _check_alone(part: str) -> None:
    """Raise a `ValueError` if a part of a stack names several corrections, as "xgrad,agc" does."""
    if not re.search(r"[,;&|\s]", part):
        return
    several = several_in(part)
    if several:
        raise ValueError(
            f"corrections must be separated by spaces, or stacked with '+', got {part!r}; "
            f"write {' '.join(several)} or {'+'.join(several)}"
        )


def created(text: str) -> tuple[Correction, ...]:
    """Return the corrections behind one string.

    Raises:
        ValueError: If it cannot be read, names several, or a correction or an option is unknown
            or has a value that it may not have.
    """
    several = _separated(text)
    if len(several) > 1:
        raise ValueError(
            f"corrections must be separated by spaces, got {text!r}; "
            f"use --corrections {' '.join(several)}, "
            f"or {'+'.join(several)} for all of them together"
        )
    try:
        correction = regrad.create(text)
    except (TypeError, RecursionError) as problem:
        raise ValueError(str(problem)) from problem
    return correction if isinstance(correction, tuple) else (correction,)


def _recipes(stack: Iterable[Correction]) -> list[tuple[str, dict[str, Any]]]:
    """Return what makes corrections the same, however their options were written."""
    return [(correction.name, vars(correction.options)) for correction in stack]


def _separated(text: str) -> list[str]:
    """Return the corrections that a text with commas means.

    What stands after a comma belongs to the correction before it if it can be an option.

    Example:
        >>> _separated("xgrad:horizon=2,decay=[1,2],agc")
        ['xgrad:horizon=2,decay=[1,2]', 'agc']
    """
    several: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^,;])+", text):
        name = item.partition("=")[0]
        if several and "=" in item and ":" not in name:
            several[-1] += f",{item}"
            continue
        names, colon, option = item.strip().partition(":")
        words = names.split()
        several += words[:-1]
        if words:
            several.append(f"{words[-1]}{colon}{option}")
    return several


def create_all(arm: Arm) -> list[Correction]:
    """Return fresh corrections to attach in `arm`, its control's own among them."""
    extra = arm.control.corrections if arm.control else ()
    return list(chain.from_iterable(created(text) for text in (*arm.corrections, *extra)))


def must_beat(arms: Iterable[Arm]) -> dict[str, str | None]:
    """Return what each correction arm must beat, by its name."""
    return {arm.name: arm.must_beat for arm in arms if arm.corrections}


def control_of_stack(corrections: Sequence[str], optimizer: Optimizer) -> Control | None:
    """Return the change that corrections attached together must beat; None where they have none.

    Each correction gives way to its control. One without a control stays: otherwise the stack
    would be credited with what that correction achieves alone.

    Args:
        corrections: As for `regrad.create`.
        optimizer: What is trained with: a control depends on it.

    Raises:
        ValueError: If a correction cannot be created, or the controls do not go together.
    """
    stacks = [created(text) for text in corrections]
    controls = [merged(part.control(optimizer) for part in stack) for stack in stacks]
    if not any(controls):
        return None
    kept = [
        control or Control(name=text, corrections=(text,))
        for text, control in zip(corrections, controls, strict=True)
    ]
    return merged(kept)


def merged(controls: Iterable[Control | None]) -> Control | None:
    """Return one control that makes every change of these; None if there is none.

    Raises:
        ValueError: If two of them set the same option of the optimizer differently, or train
            with different optimizers.
    """
    present = [control for control in controls if control is not None]
    if not present:
        return None
    together = present[0]
    for control in present[1:]:
        name = together.name
        if control.name != name:
            name = f"{name}+{control.name}"
        together = Control(
            name=name,
            optimizer=_united(together.optimizer, control.optimizer),
            optimizer_class=_one_class(together.optimizer_class, control.optimizer_class),
            head_init=together.head_init * control.head_init,
            head_lr=together.head_lr * control.head_lr,
            body_lr=together.body_lr * control.body_lr,
            corrections=tuple(dict.fromkeys((*together.corrections, *control.corrections))),
        )
    return together


def _united(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of both, or raise a `ValueError` if they differ."""
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            raise ValueError(
                f"the controls of a stack must agree on {key}, got {one[key]!r} and {other[key]!r}"
            )
    return {**one, **other}


def _one_class(
    one: type[Optimizer] | None, other: type[Optimizer] | None
) -> type[Optimizer] | None:
    """Return the class that either names, or raise a `ValueError` if they differ."""
    if one is None or other is None:
        return one or other
    if one is not other:
        raise ValueError(
            "the controls of a stack must agree on the optimizer, "
            f"got {one.__name__!r} and {other.__name__!r}"
        )
    return one


def _repeats(change: Control, corrections: Sequence[str]) -> bool:
    """Say whether a change is the arm's own corrections in another order, and nothing else.

    This happens if two corrections are each other's control.
    """
    is_all = replace(change, name="", corrections=()) == Control(name="")
    return is_all and sorted(change.corrections) == sorted(corrections)


def _control_arm(change: Control, corrected: Arm, arms: Sequence[Arm]) -> Arm:
    """Return the arm that makes this change already, or a new one."""
    new = Arm(change.name, control=change, control_of=corrected.corrections)
    for arm in arms:
        if arm.recipe == new.recipe:
            return arm
    if new.name in {arm.name for arm in arms}:
        return replace(new, name=f"{change.name} ({corrected.name})")
    return new
