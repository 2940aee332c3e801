"""Look inside wrappers: the user's module, and the optimizers that wrap one another."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn, optim

# Where a wrapper keeps the optimizer that it steps: Accelerate, Lightning and most others;
# SAM; timm's Lookahead; torch's PostLocalSGDOptimizer.
INNER = ("optimizer", "base_optimizer", "_base_optimizer", "optim")


def innermost_module(model: nn.Module) -> nn.Module:
    """Return the user's module inside data-parallel and compile wrappers."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return innermost_module(inner) if isinstance(inner, nn.Module) else model


def optimizer_layers(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it wraps, outermost first.

    Raises:
        TypeError: If the innermost is not a torch optimizer.
    """
    layers = [optimizer]
    while (inner := _inner_optimizer(layers[-1])) is not None:
        layers.append(inner)
    if not isinstance(layers[-1], optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer or wrap one, "
            f"got {type(layers[-1]).__name__}"
        )
    return layers


def _inner_optimizer(optimizer: Any) -> Any:
    """Return what a wrapper steps, or None if `optimizer` wraps nothing."""
    for name in INNER:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, optim.Optimizer):
            return inner
        wraps_further = any(hasattr(inner, further) for further in INNER)
        if wraps_further and hasattr(inner, "step"):
            return inner
    return None


def innermost_optimizer(optimizer: Any) -> optim.Optimizer:
    """Return the torch optimizer inside wrappers that holds all parameters.

    Raises:
        TypeError: If there is none.
    """
    return holder_of_all(optimizer_layers(optimizer))


def holder_of_all(layers: Sequence[Any]) -> optim.Optimizer:
    """Return the innermost of some layers of optimizers that holds all parameters.

    What a ZeroRedundancyOptimizer steps holds those of its own process alone.
    """
    for layer in layers:
        if is_kind(layer, "zeroredundancyoptimizer"):
            return layer  # type: ignore[no-any-return]
    return layers[-1]  # type: ignore[no-any-return]


def is_compiled(model: nn.Module) -> bool:
    """Say whether `model` is what torch.compile returned, or was compiled in place."""
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


def was_compiled_and_called(model: nn.Module) -> bool:
    """Say whether torch.compile has already traced `model`: hooks added now would not fire."""
    compiled = [module for module in model.modules() if is_compiled(module)]
    if not compiled:
        return False
    # Loads the compiler.
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # noqa: PLC0415

    return any(
        _debug_get_cache_entry_list(type(innermost_module(module)).forward.__code__)
        for module in compiled
    )


def wrap_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Return (args, kwargs) of `optimizer.step` with `then` called after its closure.

    Returns:
        None if no closure is passed.
    """
    optimizer, *positional = args
    rest = dict(kwargs)
    closure = positional.pop(0) if positional else rest.pop("closure", None)
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def corrected_closure() -> Any:
        loss = closure()
        then()
        return loss

    return (optimizer, corrected_closure, *positional), rest


def is_kind(instance: object, name: str) -> bool:
    """Say whether a class in the lineage, or its module, has a name.

    Recognises the classes of libraries without importing them.

    Args:
        instance: Of any class.
        name: In lower case and without underscores.
    """
    for ancestor in type(instance).__mro__:
        full_name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name in full_name.lower().replace("_", ""):
            return True
    return False
