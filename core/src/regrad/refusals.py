"""What attach refuses, and why: checked before anything changes."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from regrad import other_optimizers
from regrad.correction import Correction, did_you_mean
from regrad.errors import RegradError
from regrad.hookspecs import Layout
from regrad.optimizers import parameters_of
from regrad.reading import IN_WORDS, Implied
from regrad.wrappers import holder_of_all, is_kind

# Wrappers that pull the weights elsewhere after the wrapped optimizer's step.
MOVES_AFTER_THE_STEP = ("lookahead", "optimizer.trac", "optimizer.magma")
INSIDE = "inside"  # for attach: the model computes its loss itself
ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def check_arguments(models: Sequence[Any], criterion: Any) -> None:
    """Raise unless models and criterion are what attach takes.

    Raises:
        ValueError: If the criterion is a word other than "inside".
        TypeError: If a model is no module, or the criterion cannot be called.
    """
    _refuse_what_is_no_model(models)
    _refuse_what_is_no_criterion(criterion)


def check(
    models: Sequence[Any],
    layers: Sequence[Any],
    corrections: Sequence[Correction],
    criterion: Any,
    *,
    is_served: bool = False,
) -> None:
    """Raise unless these corrections can work correctly on these models and this optimizer.

    What depends on the layout is left to `check_layout`.

    Args:
        models: The modules given to attach.
        layers: The optimizer given to attach and those inside of it, outermost first.
        corrections: In acting order.
        criterion: The criterion given to attach.
        is_served: Whether the layout of another distribution answers for the engine, and
            for where its optimizer keeps parameters.

    Raises:
        ValueError: If the criterion is a word other than "inside".
        TypeError: If a model is not a module, or the criterion cannot be called.
        RegradError: For every refusal, with its reason.
    """
    optimizer = holder_of_all(layers)
    check_arguments(models, criterion)
    if not is_served:
        _refuse_deepspeed((*models, *layers))
        _refuse_weights_cut_by_deepspeed(models)
    _refuse_lazy_modules(models)
    if not is_served:
        _refuse_foreign_parameters(models, optimizer)
        _refuse_models_inside_fsdp1(models, optimizer)
    _refuse_steps_inside_backward(models, layers)
    _refuse_meta_parameters(models, optimizer)
    _refuse_optimizers_without_hooks(optimizer)
    _refuse_a_second_attachment(optimizer)
    for correction in corrections:
        _refuse_a_second_use(correction)
        _refuse_several_closure_calls(correction, layers)
        _refuse_optimizers_that_move_weights(correction, layers)
        _refuse_a_second_look_ahead(correction, optimizer)
        _refuse_a_missing_criterion(correction, criterion)


def check_layout(corrections: Sequence[Correction], layout: Layout) -> None:
    """Raise unless all corrections are exact on a layout.

    Args:
        corrections: In acting order.
        layout: How model and optimizer lie now.

    Raises:
        RegradError: For the first that is not, with the reason.
    """
    for correction in corrections:
        _refuse_layout(correction, layout)


def check_together(
    corrections: Sequence[Correction], wrappers: Sequence[nn.parallel.DistributedDataParallel]
) -> None:
    """Raise if some processes may step without the others and a correction reads micro-batches.

    Such a correction exchanges numbers in a step. Attach cannot know it: both are
    contexts of the loop.

    Args:
        corrections: In acting order.
        wrappers: Those in the model given to attach.

    Raises:
        RegradError: For the first such correction.
    """
    why = _why_apart(wrappers)
    for correction in corrections:
        if why is not None and "micro" in correction.needs.reads:
            raise RegradError(
                f"{correction.name!r} must see steps that all processes take together, but {why}"
            )


def _why_apart(wrappers: Sequence[nn.parallel.DistributedDataParallel]) -> str | None:
    """Return why a step is not one of all processes, and what to do; None if it is."""
    for wrapper in wrappers:
        if wrapper._join_config.enable:
            return (
                "under torch's Join they stop at different ones; give every process the same "
                "number of batches"
            )
        if not wrapper.require_backward_grad_sync:
            return (
                "DistributedDataParallel has not reduced these gradients, as in local SGD; step "
                "outside of no_sync()"
            )
    return None


# ---- of models, optimizer and criterion


def _refuse_what_is_no_model(models: Sequence[Any]) -> None:
    if not models:
        raise TypeError("model must be a torch.nn.Module or a list of modules, got an empty list")
    for model in models:
        if not isinstance(model, nn.Module):
            _refuse_deepspeed([model])
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
    if any(_is_of_deepspeed(part) for part in parts):
        raise RegradError(
            "DeepSpeed hides gradients; use DDP, FSDP2, or ZeRO with regrad-deepspeed installed"
        )


def _is_of_deepspeed(part: object) -> bool:
    """Say whether a class in the lineage is DeepSpeed's or wraps one, by class or module.

    A module of the user's own may have the word in its name.
    """
    for ancestor in type(part).__mro__:
        if "deepspeed" in ancestor.__name__.lower() or "deepspeed" in ancestor.__module__.split(
            "."
        ):
            return True
    return False


def _refuse_weights_cut_by_deepspeed(models: Sequence[nn.Module]) -> None:
    for model in models:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise RegradError(
                "DeepSpeed's ZeRO stage 3 hides parameters and gradients; use DDP, FSDP2, or "
                "install regrad-deepspeed"
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


def _refuse_models_inside_fsdp1(models: Sequence[nn.Module], optimizer: Optimizer) -> None:
    """Refuse a model whose parameters a wrapper around it has laid out flat, if that is not given.

    It alone looks like one that is not sharded.
    """
    flattened = {p for p in parameters_of(optimizer) if getattr(p, "_fsdp_flattened", False)}
    if not flattened:
        return
    for model in models:
        for module in model.modules():
            handle: Any = vars(module).get("_handle")
            flat: Any = getattr(handle, "flat_param", None)
            if flat is not None:
                flattened -= {flat, *(getattr(flat, "_params", None) or ())}
    if flattened:
        raise RegradError(
            "model must be the FullyShardedDataParallel that holds all parameters of the "
            f"optimizer, got {type(models[0]).__name__}, inside of it; attach to the wrapper"
        )


def _refuse_steps_inside_backward(models: Sequence[nn.Module], layers: Sequence[Any]) -> None:
    if any(getattr(layer, "_overlap_with_ddp", False) for layer in layers):
        raise RegradError(
            "the optimizer must not step inside backward; make the ZeroRedundancyOptimizer without "
            "overlap_with_ddp"
        )
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


def _refuse_layout(correction: Correction, layout: Layout) -> None:
    """Refuse a layout that does not offer what is read, or that is not on a list of layouts."""
    needs = correction.needs
    if "update" in needs.stages and layout.own_step is not None:
        raise RegradError(
            f"{correction.name!r} is not exact on layout {layout.name!r}: it changes what the "
            "optimizer does, and this engine steps tensors of its own; use DDP or FSDP2"
        )
    for need in needs.reads:
        if need not in layout.offers:
            why = needs.conflicts.get(layout.name) or layout.why_not(need)
            raise RegradError(
                f"{correction.name!r} is not exact on layout {layout.name!r}: it reads "
                f"{IN_WORDS[need]}, which this layout does not offer; {why}"
            )
    follows_from_reads = isinstance(needs.layouts, Implied) and needs.reads
    if layout.name not in needs.layouts and not follows_from_reads:
        why = needs.conflicts.get(layout.name, "of this one nothing is proved")
        raise RegradError(
            f"{correction.name!r} is not exact on layout {layout.name!r}; "
            f"it is on {', '.join(needs.layouts)}; {why}"
        )


def _refuse_several_closure_calls(correction: Correction, layers: Sequence[Any]) -> None:
    moves_weights = "weights" in correction.needs.stages
    allows_several = correction.needs.closures and not moves_weights
    if not allows_several and any(isinstance(layer, LBFGS) for layer in layers):
        raise RegradError(f"{correction.name!r} must see one closure call; LBFGS makes several")


def _refuse_optimizers_that_move_weights(correction: Correction, layers: Sequence[Any]) -> None:
    """Refuse a window, or flows added to hidden states, if the optimizer moves weights too."""
    stages = correction.needs.stages
    for layer in layers:
        if "weights" in stages or "hidden" in stages:
            _refuse_a_second_evaluation(correction, layer)
        if "weights" in stages:
            _refuse_discrete_weights(correction, layer)
            _refuse_schedule_free(correction, layer)
            _refuse_moves_after_the_step(correction, layer)
        if "update" in stages:
            _refuse_a_second_copy(correction, layer)


def _refuse_a_second_evaluation(correction: Correction, layer: Any) -> None:
    if _evaluates_elsewhere(layer):
        raise RegradError(
            f"{correction.name!r} must see one forward and backward per step, at the weights "
            f"that it knows; {type(layer).__name__} evaluates the model a second time at weights "
            "of its own"
        )


def _refuse_discrete_weights(correction: Correction, layer: Any) -> None:
    """Refuse an optimizer that says, by `discrete_weights`, that weights hold single values."""
    if getattr(layer, "discrete_weights", False) is True:
        raise RegradError(
            f"{correction.name!r} moves weights on along their last step; weights of "
            f"{type(layer).__name__} hold single values with nothing between or beyond them"
        )


def _refuse_schedule_free(correction: Correction, layer: Any) -> None:
    if is_kind(layer, "schedulefree"):
        raise RegradError(
            f"{correction.name!r} and a Schedule-Free optimizer both move the point at which the "
            "gradient is taken"
        )


def _refuse_a_second_copy(correction: Correction, layer: Any) -> None:
    if is_kind(layer, "schedulefree"):
        raise RegradError(
            f"{correction.name!r} changes what the optimizer does to the weights; a Schedule-Free "
            "optimizer keeps them twice, and the other ones would not change; use one of the two"
        )


def _refuse_moves_after_the_step(correction: Correction, layer: Any) -> None:
    if any(is_kind(layer, kind) for kind in MOVES_AFTER_THE_STEP):
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


def _evaluates_elsewhere(optimizer: Any) -> bool:
    """Say whether an optimizer, as those like SAM, needs a gradient at perturbed weights."""
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        return True
    return any(kind.__name__.lower().endswith("sam") for kind in type(optimizer).__mro__)
