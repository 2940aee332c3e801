"""What attach refuses, and why: checked before anything changes."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from regrad import other_optimizers, sharding
from regrad.correction import Correction, did_you_mean
from regrad.errors import RegradError
from regrad.optimizers import parameters_of

# Wrappers that pull the weights elsewhere after the wrapped optimizer's step.
MOVES_AFTER_THE_STEP = ("lookahead", "optimizer.trac", "optimizer.magma")
INSIDE = "inside"  # for attach: the model computes its loss itself
ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def layout_of(models: Sequence[nn.Module], layers: Sequence[Any]) -> str:
    """Return the layout of the weights.

    Args:
        models: The modules given to attach.
        layers: The optimizer given to attach and those inside of it.

    Returns:
        "plain", "ddp", "fsdp2", or "flat" (FSDP1, ZeroRedundancyOptimizer).
    """
    if any(_is_kind(layer, "zeroredundancyoptimizer") for layer in layers):
        return "flat"
    modules: list[nn.Module] = []
    for model in models:
        modules.extend(model.modules())
    if any(_is_kind(module, "fullyshardeddataparallel") for module in modules):
        return "flat"
    if any(sharding.is_sharded(parameter) for parameter in parameters_of(layers[-1])):
        return "fsdp2"
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        return "ddp"
    return "plain"


def check(
    models: Sequence[Any], layers: Sequence[Any], corrections: Sequence[Correction], criterion: Any
) -> None:
    """Raise unless these corrections can work correctly on these models and this optimizer.

    Args:
        models: The modules given to attach.
        layers: The optimizer given to attach and those inside of it, outermost first.
        corrections: In acting order.
        criterion: The criterion given to attach.

    Raises:
        ValueError: If the criterion is a word other than "inside".
        TypeError: If a model is not a module, or the criterion cannot be called.
        RegradError: For every refusal, with its reason.
    """
    optimizer = layers[-1]
    _refuse_what_is_no_model(models)
    _refuse_what_is_no_criterion(criterion)
    _refuse_deepspeed((*models, *layers))
    _refuse_weights_cut_by_deepspeed(models)
    _refuse_lazy_modules(models)
    _refuse_foreign_parameters(models, optimizer)
    _refuse_steps_inside_backward(models)
    _refuse_meta_parameters(models, optimizer)
    _refuse_optimizers_without_hooks(optimizer)
    _refuse_a_second_attachment(optimizer)
    layout = layout_of(models, layers)
    for correction in corrections:
        _refuse_a_second_use(correction)
        _refuse_layout(correction, layout)
        _refuse_several_closure_calls(correction, optimizer)
        _refuse_optimizers_that_move_weights(correction, layers)
        _refuse_a_second_look_ahead(correction, optimizer)
        _refuse_a_missing_criterion(correction, criterion)


# ---- of models, optimizer and criterion


def _refuse_what_is_no_model(models: Sequence[Any]) -> None:
    if not models:
        raise TypeError("model must be a torch.nn.Module or a list of modules, got an empty list")
    for model in models:
        if not isinstance(model, nn.Module) and not _is_kind(model, "deepspeed"):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _refuse_what_is_no_criterion(criterion: Any) -> None:
    if isinstance(criterion, str):
        if criterion != INSIDE:
            near = did_you_mean(criterion, [INSIDE])
            raise ValueError(
                f"criterion must be a loss function or {INSIDE!r}, got {criterion!r}{near}"
            )
        return
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable, got {criterion!r}")


def _refuse_deepspeed(parts: Sequence[Any]) -> None:
    if any(_is_kind(part, "deepspeed") for part in parts):
        raise RegradError("DeepSpeed hides gradients; use DDP, FSDP2")


def _refuse_weights_cut_by_deepspeed(models: Sequence[nn.Module]) -> None:
    for model in models:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise RegradError(
                "DeepSpeed's ZeRO stage 3 hides parameters and gradients; use DDP, FSDP2"
            )


def _refuse_lazy_modules(models: Sequence[nn.Module]) -> None:
    for model in models:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise RegradError(
                    f"parameter {name!r} has no shape yet (a lazy module); "
                    "run one batch through the model before attach()"
                )


def _refuse_foreign_parameters(models: Sequence[nn.Module], optimizer: Optimizer) -> None:
    held = set(parameters_of(optimizer))
    if all(held.isdisjoint(model.parameters()) for model in models):
        raise RegradError(
            "optimizer must hold parameters of model, got none; pass the model that it trains"
        )


def _refuse_steps_inside_backward(models: Sequence[nn.Module]) -> None:
    for model in models:
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.parameters()):
            raise RegradError("the optimizer must not step inside backward")


def _refuse_meta_parameters(models: Sequence[nn.Module], optimizer: Optimizer) -> None:
    """Refuse parameters that have a shape but no values yet."""
    for parameter in parameters_of(optimizer):
        if parameter.is_meta:
            raise RegradError(
                f"parameters must hold values, got {_name_of(parameter, models)} on the meta "
                "device; materialise the model first: model.to_empty(device=…), then initialise "
                "or load it"
            )


def _name_of(parameter: nn.Parameter, models: Sequence[nn.Module]) -> str:
    """Return a parameter's name in the models, quoted."""
    for model in models:
        for name, candidate in model.named_parameters():
            if candidate is parameter:
                return repr(name)
    return repr("one outside the model")


def _refuse_optimizers_without_hooks(optimizer: Optimizer) -> None:
    """Refuse an optimizer that skipped the constructor in which torch makes room for hooks."""
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        raise RegradError(
            f"{type(optimizer).__name__} cannot hold hooks, because it does not call "
            "super().__init__(); attach to the optimizer that it wraps, or add that call"
        )


def _refuse_a_second_attachment(optimizer: Optimizer) -> None:
    if optimizer in ATTACHED:
        raise RegradError("optimizer is already attached; detach() the other attachment first")


# ---- of one correction


def _refuse_a_second_use(correction: Correction) -> None:
    if correction.attachment is not None:
        raise RegradError(
            f"{correction.name!r} is already attached; create another for a second attachment"
        )


def _refuse_layout(correction: Correction, layout: str) -> None:
    needs = correction.needs
    if layout not in needs.layouts:
        why = needs.conflicts.get(layout, "nothing is proved for this one")
        raise RegradError(
            f"{correction.name!r} is not exact on layout {layout!r}; "
            f"it is on {', '.join(needs.layouts)}; {why}"
        )


def _refuse_several_closure_calls(correction: Correction, optimizer: Optimizer) -> None:
    moves_weights = "weights" in correction.needs.stages
    allows_several = correction.needs.closures and not moves_weights
    if isinstance(optimizer, LBFGS) and not allows_several:
        raise RegradError(f"{correction.name!r} must see one closure call; LBFGS makes several")


def _refuse_optimizers_that_move_weights(correction: Correction, layers: Sequence[Any]) -> None:
    """Refuse a window, or flows added to hidden states, if the optimizer moves weights too."""
    stages = correction.needs.stages
    for layer in layers:
        if "weights" in stages or "hidden" in stages:
            _refuse_a_second_evaluation(correction, layer)
        if "weights" in stages:
            _refuse_schedule_free(correction, layer)
            _refuse_moves_after_the_step(correction, layer)


def _refuse_a_second_evaluation(correction: Correction, layer: Any) -> None:
    if _evaluates_elsewhere(layer):
        raise RegradError(
            f"{correction.name!r} must see one forward and backward per step, at the weights "
            f"that it knows; {type(layer).__name__} evaluates the model a second time at weights "
            "of its own"
        )


def _refuse_schedule_free(correction: Correction, layer: Any) -> None:
    if _is_kind(layer, "schedulefree"):
        raise RegradError(
            f"{correction.name!r} and a Schedule-Free optimizer both move the point at which the "
            "gradient is taken"
        )


def _refuse_moves_after_the_step(correction: Correction, layer: Any) -> None:
    if any(_is_kind(layer, kind) for kind in MOVES_AFTER_THE_STEP):
        raise RegradError(
            f"{correction.name!r} predicts the next step; {type(layer).__name__} moves the "
            "weights once more after it; use one of the two"
        )


def _refuse_a_second_look_ahead(correction: Correction, optimizer: Optimizer) -> None:
    if "weights" not in correction.needs.stages:
        return
    other = other_optimizers.looks_ahead_on(parameters_of(optimizer))
    if other is not None:
        raise RegradError(
            f"{correction.name!r} would move parameters that another attachment "
            f"(of {type(other.optimizer).__name__}) moves already; "
            "call detach() on that one first"
        )


def _refuse_a_missing_criterion(correction: Correction, criterion: Any) -> None:
    if "criterion" in correction.needs.stages and criterion is None:
        raise RegradError(
            f"{correction.name!r} corrects the criterion; pass criterion=… to attach and "
            f"call attachment.criterion, or criterion={INSIDE!r} where the model computes its "
            "loss itself"
        )


# ---- what optimizers and wrappers are


def _is_kind(instance: object, name: str) -> bool:
    """Say whether a class in the lineage, or its module, has a name.

    Recognises the classes of libraries without importing them.
    """
    for ancestor in type(instance).__mro__:
        full_name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name in full_name.lower().replace("_", ""):
            return True
    return False


def _evaluates_elsewhere(optimizer: Any) -> bool:
    """Say whether an optimizer, as those like SAM, needs a gradient at perturbed weights."""
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        return True
    return any(kind.__name__.lower().endswith("sam") for kind in type(optimizer).__mro__)
