"""Hook objects that torch.compile leaves alone and that do not follow copies of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def _copied_hook() -> Hook:
    return Hook(None, None)


class Hook:
    """A callable for one module; on copies and after unpickling it does nothing.

    Args:
        module: The module whose events count, None for none.
        function: Called with the event's arguments.
    """

    def __init__(self, module: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self.module = module
        self.function = function

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if self.function is None or module is not self.module:
            return None
        return self.function(module, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return _copied_hook()

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _copied_hook, ()


def innermost_module(model: nn.Module) -> nn.Module:
    """Return the user's module inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def innermost_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers that keep it as `.optimizer`.

    Raises:
        TypeError: If there is none.
    """
    seen = optimizer
    while not isinstance(seen, Optimizer) or not hasattr(seen, "_optimizer_step_pre_hooks"):
        if not hasattr(seen, "optimizer"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
        seen = seen.optimizer
    return seen


def was_compiled_and_called(model: nn.Module) -> bool:
    """Say whether torch.compile has already traced `model`: hooks added now would never fire inside."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if not compiled:
        return False
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # noqa: PLC0415 - loads the compiler

    codes = (type(innermost_module(m)).forward.__code__ for m in compiled)
    return any(map(_debug_get_cache_entry_list, codes))


def wrap_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Return (args, kwargs) of `optimizer.step` with `then` called after its closure; None without a closure."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def corrected_closure() -> Any:
        loss = closure()
        then()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": corrected_closure}
    return (args[0], corrected_closure, *args[2:]), kwargs
