"""Attachments that look ahead, and what other optimizers do to the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from regrad.engine import Engine

LOOKING_AHEAD: weakref.WeakSet[Engine] = weakref.WeakSet()
_global_hook: list[Any] = []


def looks_ahead_on(parameters: Iterable[Tensor]) -> Engine | None:
    """Return the engine that moves any of the parameters for its forward passes, or None."""
    wanted = set(parameters)
    for engine in LOOKING_AHEAD:
        if any(p in wanted for group in engine.optimizer.param_groups for p in group["params"]):
            return engine
    return None


def add(engine: Engine) -> None:
    """Let an engine's window be closed before any other optimizer steps its parameters.

    Such a step would otherwise start from the predicted weights, and be undone when they are
    restored.
    """
    LOOKING_AHEAD.add(engine)
    if not _global_hook:
        _global_hook.append(register_optimizer_step_pre_hook(_before_any_step))


def discard(engine: Engine) -> None:
    """Undo `add`."""
    LOOKING_AHEAD.discard(engine)
    if not LOOKING_AHEAD and _global_hook:
        _global_hook.pop().remove()


def _before_any_step(
    optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Tell every engine that looks ahead on parameters of another optimizer that it steps."""
    changed = None
    for engine in list(LOOKING_AHEAD):
        if engine.owns(optimizer):
            continue
        result = engine.before_other_step(optimizer, args, kwargs)
        if result is not None:
            args, kwargs = result
            changed = result
    return changed
