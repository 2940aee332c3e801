"""What attach refuses, and why: checked before anything changes."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from regrad import sharding
from regrad.correction import Correction
from regrad.errors import RegradError, refuse_if

ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _is_kind(instance: object, name: str) -> bool:
    """Say whether a class or module in the lineage has `name`: recognises libraries without importing them."""
    return any(
        name in f"{c.__module__}.{c.__qualname__}".lower().replace("_", "")
        for c in type(instance).__mro__
    )


def layout_of(model: nn.Module, optimizer: Optimizer) -> str:
    """Return how the weights lie: "plain", "ddp", "fsdp2", or "flat" (FSDP1, ZeroRedundancyOptimizer)."""
    modules = list(model.modules())
    if _is_kind(optimizer, "zeroredundancyoptimizer") or any(
        _is_kind(m, "fullyshardeddataparallel") for m in modules
    ):
        return "flat"
    if any(sharding.is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return "fsdp2"
    return (
        "ddp"
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules)
        else "plain"
    )


def check(
    model: Any, optimizer: Optimizer, given: Any, corrections: Sequence[Correction], criterion: Any
) -> None:
    """Raise unless these corrections can be right on this model and optimizer.

    Args:
        model: The module given to attach.
        optimizer: The innermost optimizer.
        given: The optimizer as given to attach.
        corrections: In acting order.
        criterion: The criterion given to attach.

    Raises:
        TypeError: If the model is no module, or the criterion cannot be called.
        RegradError: For every refusal, with its reason.
    """
    if not isinstance(model, nn.Module) and not _is_kind(model, "deepspeed"):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable, got {criterion!r}")
    refuse_if(
        any(_is_kind(part, "deepspeed") for part in (model, given)),
        "DeepSpeed hides gradients; use DDP, FSDP2",
    )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise RegradError("DeepSpeed's ZeRO stage 3 hides parameters and gradients; use DDP, FSDP2")
    own, layout = set(model.parameters()), layout_of(model, optimizer)
    trains = any(p in own for group in optimizer.param_groups for p in group["params"])
    refuse_if(
        not trains,
        "optimizer must hold parameters of model, got none; pass the model that it trains",
    )
    _refuse_meta(model, optimizer)
    refuse_if(
        optimizer in ATTACHED, "optimizer is attached already; detach() the other attachment first"
    )
    refuse_if(
        any(hasattr(p, "_in_backward_optimizers") for p in own),
        "the optimizer must not step inside backward",
    )
    several, ahead = isinstance(optimizer, LBFGS), _is_kind(optimizer, "schedulefree")
    for c in corrections:
        name, needs, moves = repr(c.name), c.needs, "weights" in c.needs.stages
        layouts = f"{', '.join(needs.layouts)}; {needs.conflicts.get(layout, 'of this one nothing is proved')}"
        lost = "criterion" in needs.stages and criterion is None
        refuse_if(
            c.attachment is not None,
            f"{name} is attached already; create another for a second attachment",
        )
        refuse_if(
            layout not in needs.layouts,
            f"{name} is not exact on layout {layout!r}; it is on {layouts}",
        )
        refuse_if(
            several and (moves or not needs.closures),
            f"{name} must see one closure call; LBFGS makes several",
        )
        refuse_if(
            moves and ahead,
            f"{name} and a Schedule-Free optimizer both move the point of the gradient",
        )
        refuse_if(
            lost,
            f"{name} corrects the criterion; pass criterion=… to attach and call attachment.criterion",
        )


def _refuse_meta(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse parameters that have a shape but no numbers yet."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.is_meta:
                raise RegradError(
                    "parameters must have numbers, got "
                    f"{names.get(parameter, 'one outside the model')!r} on the meta device; "
                    "materialise the model first: model.to_empty(device=…), then initialise or load it"
                )
