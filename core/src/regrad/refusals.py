"""What attach refuses, and why: checked before anything changes."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from regrad import other_optimizers, sharding
from regrad.correction import Correction
from regrad.errors import RegradError

# Wrappers that pull the weights elsewhere after the wrapped optimizer's step.
MOVES_AFTER_THE_STEP = ("lookahead", "optimizer.trac", "optimizer.magma")
ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _is_kind(instance: object, name: str) -> bool:
    """Say whether a class or module in the lineage has `name`: recognises libraries without importing them."""
    return any(
        name in f"{c.__module__}.{c.__qualname__}".lower().replace("_", "")
        for c in type(instance).__mro__
    )


def layout_of(models: Sequence[nn.Module], layers: Sequence[Any]) -> str:
    """Return how the weights lie: "plain", "ddp", "fsdp2", or "flat" (FSDP1, ZeroRedundancyOptimizer).

    Args:
        models: The modules given to attach.
        layers: The optimizer given to attach and those inside of it.
    """
    modules = [module for model in models for module in model.modules()]
    if any(_is_kind(layer, "zeroredundancyoptimizer") for layer in layers):
        return "flat"
    if any(_is_kind(module, "fullyshardeddataparallel") for module in modules):
        return "flat"
    groups = layers[-1].param_groups
    if any(sharding.is_sharded(parameter) for group in groups for parameter in group["params"]):
        return "fsdp2"
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        return "ddp"
    return "plain"


def check(
    models: Sequence[Any], layers: Sequence[Any], corrections: Sequence[Correction], criterion: Any
) -> None:
    """Raise unless these corrections can be right on these models and this optimizer.

    Args:
        models: The modules given to attach.
        layers: The optimizer given to attach and those inside of it, outermost first.
        corrections: In acting order.
        criterion: The criterion given to attach.

    Raises:
        TypeError: If a model is no module, or the criterion cannot be called.
        RegradError: For every refusal, with its reason.
    """
    optimizer = layers[-1]
    _check_types(models, criterion)
    _refuse_deepspeed((*models, *layers))
    _refuse_lazy_modules(models)
    _refuse_foreign_parameters(models, optimizer)
    _refuse_meta(models, optimizer)
    _refuse_optimizers_without_hooks(optimizer)
    if optimizer in ATTACHED:
        raise RegradError("optimizer is attached already; detach() the other attachment first")
    layout = layout_of(models, layers)
    for correction in corrections:
        if correction.attachment is not None:
            raise RegradError(
                f"{correction.name!r} is attached already; create another for a second attachment"
            )
        _refuse_layout(correction, layout)
        _refuse_several_closure_calls(correction, optimizer)
        _refuse_optimizers_that_move_weights(correction, layers)
        _refuse_a_second_look_ahead(correction, optimizer)
        if "criterion" in correction.needs.stages and criterion is None:
            raise RegradError(
                f"{correction.name!r} corrects the criterion; pass criterion=… to attach and "
                "call attachment.criterion"
            )


def _check_types(models: Sequence[Any], criterion: Any) -> None:
    if not models:
        raise TypeError("model must be a torch.nn.Module or a list of some, got an empty list")
    for model in models:
        if not isinstance(model, nn.Module) and not _is_kind(model, "deepspeed"):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable, got {criterion!r}")


def _refuse_deepspeed(parts: Sequence[Any]) -> None:
    if any(_is_kind(part, "deepspeed") for part in parts):
        raise RegradError("DeepSpeed hides gradients; use DDP, FSDP2")
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if any(hasattr(parameter, "ds_id") for module in modules for parameter in module.parameters()):
        raise RegradError("DeepSpeed's ZeRO stage 3 hides parameters and gradients; use DDP, FSDP2")


def _refuse_lazy_modules(models: Sequence[nn.Module]) -> None:
    for model in models:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise RegradError(
                    f"parameter {name!r} has no shape yet (a lazy module); "
                    "run one batch through the model before attach()"
                )


def _refuse_foreign_parameters(models: Sequence[nn.Module], optimizer: Optimizer) -> None:
    own = {parameter for model in models for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter in own for parameter in held):
        raise RegradError(
            "optimizer must hold parameters of model, got none; pass the model that it trains"
        )
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in own):
        raise RegradError("the optimizer must not step inside backward")


def _refuse_optimizers_without_hooks(optimizer: Optimizer) -> None:
    """Refuse an optimizer that skipped the constructor in which torch makes room for hooks."""
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        name = type(optimizer).__name__
        raise RegradError(
            f"{name} cannot hold hooks, since it does not call super().__init__(); "
            "attach to the optimizer that it wraps, or have it call that"
        )


def _refuse_layout(correction: Correction, layout: str) -> None:
    needs = correction.needs
    if layout not in needs.layouts:
        why = needs.conflicts.get(layout, "of this one nothing is proved")
        raise RegradError(
            f"{correction.name!r} is not exact on layout {layout!r}; "
            f"it is on {', '.join(needs.layouts)}; {why}"
        )


def _refuse_several_closure_calls(correction: Correction, optimizer: Optimizer) -> None:
    moves = "weights" in correction.needs.stages
    if isinstance(optimizer, LBFGS) and (moves or not correction.needs.closures):
        raise RegradError(f"{correction.name!r} must see one closure call; LBFGS makes several")


def _refuse_optimizers_that_move_weights(correction: Correction, layers: Sequence[Any]) -> None:
    """Refuse a window, or flows added to hidden states, where a layer of the optimizer moves weights too."""
    stages = set(correction.needs.stages)
    for layer in layers:
        name = type(layer).__name__
        if _evaluates_elsewhere(layer) and stages & {"weights", "hidden"}:
            raise RegradError(
                f"{correction.name!r} must see one forward and backward per step, at the weights "
                f"that it knows; {name} evaluates the model a second time at weights of its own"
            )
        if "weights" not in stages:
            continue
        if _is_kind(layer, "schedulefree"):
            raise RegradError(
                f"{correction.name!r} and a Schedule-Free optimizer both move the point of the "
                "gradient"
            )
        moving = [kind for kind in MOVES_AFTER_THE_STEP if _is_kind(layer, kind)]
        if moving:
            raise RegradError(
                f"{correction.name!r} predicts the coming step; {name} moves the weights once "
                "more after it; use one of the two"
            )


def _evaluates_elsewhere(optimizer: Any) -> bool:
    """Say whether an optimizer is of the family of SAM: it needs a gradient at perturbed weights."""
    has_two_steps = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    return has_two_steps or any(
        lineage.__name__.lower().endswith("sam") for lineage in type(optimizer).__mro__
    )


def _refuse_a_second_look_ahead(correction: Correction, optimizer: Optimizer) -> None:
    if "weights" not in correction.needs.stages:
        return
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    other = other_optimizers.looks_ahead_on(held)
    if other is not None:
        raise RegradError(
            f"{correction.name!r} would move parameters that another attachment "
            f"(of {type(other.optimizer).__name__}) moves already; "
            "call detach() on that one first"
        )


def _refuse_meta(models: Sequence[nn.Module], optimizer: Optimizer) -> None:
    """Refuse parameters that have a shape but no numbers yet."""
    names = {p: name for model in models for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.is_meta:
                raise RegradError(
                    "parameters must have numbers, got "
                    f"{names.get(parameter, 'one outside the model')!r} on the meta device; "
                    "materialise the model first: model.to_empty(device=…), then initialise or "
                    "load it"
                )
