"""Optimizers by name: torch's own, and those of plugins."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import regrad
import torch
from regrad.text import printable
from torch import nn
from torch.optim import Optimizer

from regrad_runner.settings.specs import read_spec
from regrad_runner.workloads.workload import Defaults

OPTIMIZERS_GROUP = "regrad.optimizers"
# They need a closure, sparse gradients or only matrices, which this loop does not offer.
UNFIT = {"LBFGS", "SparseAdam", "Muon", "Optimizer"}


def spec_of(text: str | None, defaults: Defaults) -> tuple[str, float]:
    """Return the optimizer's complete spec and the learning rate that suits it.

    The workload's momentum, weight decay and learning rate belong to its own optimizer; any other
    one starts from its class's defaults.

    Raises:
        ValueError: If the optimizer is unknown or `text` cannot be read.
    """
    name, options = read_spec(text or defaults.optimizer)
    taken = inspect.signature(optimizer_class(name)).parameters
    if "lr" in options:
        raise ValueError(f"optimizer must not set lr, got {text!r}; use the setting lr")
    if name == defaults.optimizer:
        lr = float(defaults.lr)
        suitable = {"momentum": defaults.momentum, "weight_decay": defaults.weight_decay}
        options = {key: suitable[key] for key in suitable if key in taken} | options
    else:
        lr = float(taken["lr"].default)
    written = ",".join(f"{key}={value}" for key, value in options.items())
    spec = f"{name}:{written}" if written else name
    _try_step(spec, lr=lr)
    return spec, lr


def check_rate(spec: str, lr: float) -> None:
    """Raise a `ValueError` unless an optimizer can step with this learning rate."""
    try:
        parameter = _stepped(spec, lr=lr)
    except Exception as problem:
        raise ValueError(
            f"lr must be one that {spec!r} can step with, got {lr!r}: {_reason(problem)}"
        ) from problem
    if not parameter.isfinite().all():
        raise ValueError(f"lr must keep weights finite, got {lr!r} with {spec!r}")


def _try_step(spec: str, *, lr: float) -> None:
    """Raise a `ValueError` unless an optimizer can step: some options torch checks only there."""
    build_optimizer(spec, [nn.Parameter(torch.zeros(2, 2))], lr=lr)  # its own error is clear
    try:
        parameter = _stepped(spec, lr=lr)
    except Exception as problem:
        raise ValueError(
            f"optimizer must be one that can step, got {spec!r}: {_reason(problem)}"
        ) from problem
    if not parameter.isfinite().all():
        raise ValueError(f"optimizer must have options that keep weights finite, got {spec!r}")


def _stepped(spec: str, *, lr: float) -> nn.Parameter:
    """Return a parameter after a step with gradients of one."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(spec, [parameter], lr=lr)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    return parameter


def _reason(problem: Exception) -> str:
    """Return in one line what an exception says."""
    return " ".join(str(problem).split()) or type(problem).__name__


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the optimizer's class.

    Raises:
        ValueError: If neither torch nor a plugin has it.
    """
    classes = _classes_of_torch()
    if name in classes:
        return classes[name]
    plugins = regrad.available(OPTIMIZERS_GROUP)
    if name in plugins:
        loaded: type[Optimizer] = regrad.load(name, OPTIMIZERS_GROUP)
        return loaded
    there = ", ".join(map(printable, sorted([*classes, *plugins])))
    next_step = ""
    if name in regrad.available():
        next_step = f"; {name!r} is a correction: give it to --corrections"
    raise ValueError(f"no optimizer named {name!r}; there are: {there}{next_step}")


def _classes_of_torch() -> dict[str, type[Optimizer]]:
    """Return torch's optimizers by their names in lower case."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and name not in UNFIT
    }


def build_optimizer(
    spec: str, parameters: Iterable[Any], *, lr: float, changes: Mapping[str, Any] | None = None
) -> Optimizer:
    """Create an optimizer.

    Args:
        spec: Name with options, such as "sgd:momentum=0.9".
        parameters: Parameters or parameter groups.
        lr: Learning rate of the groups that set none.
        changes: Options that override those in `spec`: what a control changes.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of its range.
    """
    name, options = read_spec(spec)
    kind = optimizer_class(name)
    options.update(changes or {})
    allowed = [key for key in inspect.signature(kind).parameters if key not in ("params", "lr")]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"optimizer {name!r} has no option {key!r}; allowed: {', '.join(allowed)}"
            )
    for key, value in options.items():
        if not _is_finite(value):
            raise ValueError(f"{key} must be finite, got {value!r} in optimizer {spec!r}")
    try:
        return kind(parameters, lr=lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(
            f"optimizer must be one that torch accepts, got {spec!r}: {problem}"
        ) from problem


def of_another_class(
    optimizer: Optimizer, kind: type[Optimizer], *, changes: Mapping[str, Any]
) -> Optimizer:
    """Create an optimizer of another class for the same parameters.

    Args:
        optimizer: Whose groups keep the options that both classes have, learning rates included.
        kind: The other class.
        changes: Its options that override those; the rest are its own defaults.

    Raises:
        ValueError: If the class does not take an option in `changes`, or not its value.

    Example:
        >>> adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.8, 0.99))
        >>> of_another_class(adamw, torch.optim.NAdam, changes={}).param_groups[0]["betas"]
        (0.8, 0.99)
    """
    taken = inspect.signature(kind).parameters
    groups = []
    for group in optimizer.param_groups:
        kept = {key: value for key, value in group.items() if key in taken}
        groups.append({**kept, "params": group["params"], **changes})
    defaults = {key: value for key, value in optimizer.defaults.items() if key in taken}
    try:
        return kind(groups, **{**defaults, **changes})
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(
            f"optimizer_class must be one that takes {dict(changes)}, "
            f"got {kind.__name__}: {problem}"
        ) from problem


def _is_finite(value: Any) -> bool:
    """Say whether an option holds no number that is not finite."""
    numbers = value if isinstance(value, tuple | list) else [value]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))
