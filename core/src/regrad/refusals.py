"""What attach refuses, and why: checked before anything changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import distributed, nn
from torch.optim import LBFGS, Optimizer

from regrad.correction import Correction
from regrad.errors import RegradError
from regrad.registry import origin
from regrad.sharding import is_sharded

ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _lineage(instance: object) -> str:
    """Return module and name of every class of `instance`, to recognise libraries without importing them."""
    return " ".join(f"{c.__module__}.{c.__qualname__}" for c in type(instance).__mro__).lower()


def layout_of(model: nn.Module, optimizer: Optimizer) -> str:
    """Return how the weights lie: "plain", "ddp", "fsdp2" or "flat"."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = any("fullyshardeddataparallel" in _lineage(m) for m in model.modules())
    if flat or "zeroredundancyoptimizer" in _lineage(optimizer):
        return "flat"
    if any(map(is_sharded, parameters)):
        return "fsdp2"
    return "ddp" if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()) else "plain"


def check(model: Any, optimizer: Optimizer, given: Any, corrections: Sequence[Correction], criterion: Any) -> None:
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
    if "deepspeed" in _lineage(model) + _lineage(given):
        raise RegradError("DeepSpeed hides gradients from the optimizer's hooks; use DDP or FSDP2 (fully_shard)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable, got {criterion!r}")
    if optimizer in ATTACHED:
        raise RegradError("optimizer is attached already; detach() the other attachment first")
    if any(hasattr(p, "_in_backward_optimizers") for p in model.parameters()):
        raise RegradError("the optimizer must not be stepped inside backward; gradients are not final there")
    own = set(model.parameters())
    if not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise RegradError("optimizer must hold parameters of model, got none; pass the model that it trains")
    layout = layout_of(model, optimizer)
    for correction in corrections:
        _check_one(correction, optimizer, layout)
        if "criterion" in correction.needs.stages and criterion is None:
            raise RegradError(
                f"{correction.name!r} corrects the criterion; pass attach(…, criterion=criterion) and call attachment.criterion"
            )


def _check_one(correction: Correction, optimizer: Optimizer, layout: str) -> None:
    name, needs = correction.name, correction.needs
    if correction.attachment is not None:
        raise RegradError(f"{name!r} is attached already; create a second correction for a second attachment")
    if layout not in needs.layouts:
        raise RegradError(f"{name!r} is not exact on layout {layout!r}; it is on {', '.join(needs.layouts)}")
    moves = "window" in needs.resources
    if isinstance(optimizer, LBFGS) and (moves or not needs.closures):
        raise RegradError(f"{name!r} must see one closure call per step; LBFGS makes several")
    if moves and "schedulefree" in _lineage(optimizer).replace("_", ""):
        raise RegradError(f"{name!r} and a Schedule-Free optimizer both move the point where gradients are taken")


def agree_across_ranks(corrections: Sequence[Correction]) -> None:
    """Raise on every rank unless all ranks attach the same corrections, versions and options."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    mine = [f"{c!r} from {' '.join(origin(c))}" for c in corrections]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise RegradError(f"ranks must attach the same corrections, got {everyone[0]} on 0 and {theirs} on {rank}")
