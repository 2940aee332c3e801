"""What looks ahead, and what other optimizers do to the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regrad.window import Window


class LooksAhead(Protocol):
    """What moves parameters for its forward passes: the engine of an attachment.

    Attributes:
        optimizer: The optimizer that steps these parameters.
        window: The time during which they are moved.
    """

    optimizer: optim.Optimizer
    window: Window

    def owns(self, optimizer: Any) -> bool:
        """Say whether an optimizer is its own or a wrapper of it."""

    def names_of(self, hook: str) -> str:
        """Return the names of the corrections that implement a hook, quoted."""

    def before_other_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Restore the weights before another optimizer steps them."""


LOOKING_AHEAD: weakref.WeakSet[LooksAhead] = weakref.WeakSet()
_global_hook: list[Any] = []


def looks_ahead_on(parameters: Iterable[Tensor]) -> LooksAhead | None:
    """Return what moves any of the parameters for its forward passes, or None."""
    wanted = set(parameters)
    for engine in LOOKING_AHEAD:
        for group in engine.optimizer.param_groups:
            if not wanted.isdisjoint(group["params"]):
                return engine
    return None


def moved_by_another(own: LooksAhead, parameters: Iterable[Tensor]) -> LooksAhead | None:
    """Return what has moved any of the parameters now and is not `own`, or None."""
    if len(LOOKING_AHEAD) < 2:
        return None
    wanted = set(parameters)
    for other in LOOKING_AHEAD:
        if other is not own and not wanted.isdisjoint(other.window.moved):
            return other
    return None


def add(engine: LooksAhead) -> None:
    """Close a window before any other optimizer steps its parameters.

    Such a step would otherwise start from the predicted weights, and be undone when they are
    restored.
    """
    LOOKING_AHEAD.add(engine)
    if not _global_hook:
        _global_hook.append(register_optimizer_step_pre_hook(_before_any_step))


def discard(engine: LooksAhead) -> None:
    """Undo `add`."""
    LOOKING_AHEAD.discard(engine)
    if not LOOKING_AHEAD and _global_hook:
        _global_hook.pop().remove()


def _before_any_step(
    optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Tell everything that looks ahead that an optimizer of somebody else steps."""
    changed = None
    for engine in list(LOOKING_AHEAD):
        if engine.owns(optimizer):
            continue
        result = engine.before_other_step(optimizer, args, kwargs)
        if result is not None:
            args, kwargs = result
            changed = result
    return changed
