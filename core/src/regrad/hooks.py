"""Hook objects that torch.compile leaves alone and that do not follow copies of a model, and what is inside wrappers."""

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer


class Hook:
    """A callable for one module; on copies and after unpickling it does nothing.

    Args:
        module: The module whose events count, None for none.
        function: Called with the event's arguments.
    """

    def __init__(self, module: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self.module, self.function = module, function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        return self.function(module, *arguments) if self.function and module is self.module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, None)


def innermost_module(model: nn.Module) -> nn.Module:
    """Return the user's module inside data-parallel and compile wrappers."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return innermost_module(inner) if isinstance(inner, nn.Module) else model


def innermost_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers that keep it as `.optimizer`.

    Raises:
        TypeError: If there is none.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
    return inner


def was_compiled_and_called(model: nn.Module) -> bool:
    """Say whether torch.compile has already traced `model`: hooks added now would never fire inside."""
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if not compiled:
        return False
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # noqa: PLC0415 - loads the compiler

    return any(_debug_get_cache_entry_list(type(innermost_module(m)).forward.__code__) for m in compiled)


def wrap_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Return (args, kwargs) of `optimizer.step` with `then` called after its closure; None without a closure."""
    optimizer, closure, *rest = (*args, kwargs.get("closure")) if len(args) == 1 else args
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def corrected_closure() -> Any:
        loss = closure()
        then()
        return loss

    return (optimizer, corrected_closure, *rest), {key: kwargs[key] for key in kwargs if key != "closure"}
