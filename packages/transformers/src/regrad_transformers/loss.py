"""The loss of a Trainer's model, computed outside of it with a criterion that can be corrected."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from regrad.devices import random_numbers_kept
from regrad.errors import RegradError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

IGNORED = -100
INSIDE = "leave compute_loss_func out; the correction then acts inside the model"
OWN_LOSS = (
    f"{INSIDE}, or write a compute_loss_func of your own that calls callback.criterion for the "
    "part that is cross entropy"
)
# A model is asked for its own loss on these tokens and labels: every model has these classes.
QUESTION = (2, 3, 3, 2, 3)
ANSWER = (0, 0, 0, 0, 0)


class Target(NamedTuple):
    """What a loss compares the logits with.

    Attributes:
        shift: Whether position i is compared with label i + 1, not with its own label.
        counts: Whether the sum is divided by the labels of the whole optimizer step,
            where the Trainer counts them, not by those of the micro-batch.
    """

    shift: bool
    counts: bool


def shifts_labels(model: Any) -> bool:
    """Say whether the model's own loss compares each position with the next label.

    Neither class nor configuration tells: `GPT2LMHeadModel` shifts, `XLNetLMHeadModel`
    does not, and both have no loss type. So the model is asked for its loss on five
    tokens. One that does not take these (it wants images, or a class per row) is taken
    to have the loss that transformers names for it.

    Args:
        model: A model of transformers. Its weights, buffers and modes, and the random
            numbers, stay unchanged.
    """
    if isinstance(model, nn.Module):
        weight = next(model.parameters(), torch.zeros(()))
        tokens = torch.tensor([QUESTION], device=weight.device)
        labels = torch.tensor([ANSWER], device=weight.device)
        try:
            target = own_target(model, (), {"input_ids": tokens}, labels)
        except (RegradError, TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            target = None
        if target is not None:
            return target.shift
    named = getattr(model, "loss_function", None) is ForCausalLMLoss
    return named and not getattr(model.config, "is_encoder_decoder", False)


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Say whether the Trainer passes this model the number of labels in an optimizer step."""
    inner = _without_adapters(model)
    declared = getattr(inner, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def smoothed_target(model: nn.Module) -> Target:
    """Return the target that the Trainer takes where it smooths labels, by the model's class."""
    name = type(_without_adapters(model)).__name__
    shift = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return Target(shift, counts=accepts_loss_kwargs(model))


@torch.no_grad()
def own_target(
    model: nn.Module, arguments: tuple[Any, ...], inputs: Mapping[str, Any], labels: Tensor
) -> Target | None:
    """Return the target of the model's own loss on one batch, found by comparing with each.

    Args:
        model: The innermost module. Its weights, buffers and modes, and the random
            numbers, stay unchanged.
        arguments: Of its forward.
        inputs: Keyword arguments of its forward, with `num_items_in_batch` where the
            Trainer gives it.
        labels: Shape [N, ...].

    Returns:
        The target, or None if the model does not show it: its forward takes no labels, or every
        target gives the same loss.

    Raises:
        RegradError: If the model's own loss is none of them.
    """
    if "labels" not in inspect.signature(_without_adapters(model).forward).parameters:
        return None
    items = None
    if inputs.get("num_items_in_batch") is not None:
        # one more than there are: else a model that takes the mean could look like one that counts
        items = inputs["num_items_in_batch"] + 1
        inputs = {**inputs, "num_items_in_batch": items}
    with _nothing_changed(model):
        outputs = model(*arguments, **{**inputs, "labels": labels})
    own = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    if not isinstance(outputs, dict):
        outputs = outputs[1:]
    found = _losses_of_targets(outputs, labels, items)
    far = {target: (loss - own).abs().item() for target, loss in found.items()}
    nearest = min(far, key=lambda target: far[target])
    # a model in half precision may sum its loss there; untrained ones have all losses near log C
    tolerance = 1e-5 if _logits_of(outputs).dtype in (torch.float32, torch.float64) else 1e-2
    if not far[nearest] <= tolerance * own.abs().item():
        tried = ", ".join(f"{loss:.6g}" for loss in found.values())
        raise RegradError(
            f"loss must be cross entropy of every label, got {own:.6g} from the model itself and "
            f"{tried} from its logits; {OWN_LOSS}"
        )
    if any(far[other] == far[nearest] for other in far if other.shift != nearest.shift):
        return None
    return nearest


def _losses_of_targets(
    outputs: Any, labels: Tensor, items: Tensor | int | None
) -> dict[Target, Tensor]:
    """Return the cross entropy with every target that is possible."""
    counts = (False,) if items is None else (False, True)
    found = {}
    for shift, is_counted in itertools.product((False, True), counts):
        found[Target(shift, is_counted)] = cross_entropy(
            F.cross_entropy,
            outputs,
            labels,
            items if is_counted else None,
            shift=shift,
            label_smoothing=0.0,
        )
    return found


def _without_adapters(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a PEFT model, as the Trainer looks for it."""
    inner: nn.Module = unwrap_peft_model(model)  # type: ignore[no-untyped-call]
    return inner


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random state at the end."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with random_numbers_kept(model.parameters()):
            yield
    finally:
        for buffer, value in kept:
            if not torch.equal(buffer, value):  # a write would spoil what waits for its backward
                buffer.copy_(value)


def _logits_of(outputs: Any) -> Tensor:
    """Return the logits among a model's outputs."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def cross_entropy(
    criterion: Callable[..., Tensor],
    outputs: Any,
    labels: Tensor | None,
    items: Tensor | int | None,
    *,
    shift: bool,
    label_smoothing: float,
) -> Tensor:
    r"""Return the criterion's sum over every label that counts, divided by their number.

    .. math:: \frac{1}{n} \sum_{y_i \ne -100} \mathrm{criterion}(z_i, y_i)

    Args:
        criterion: Takes what `torch.nn.functional.cross_entropy` takes.
        outputs: Of the model: a mapping with "logits", or a tuple that begins with
            them; z, shape [N, ..., C].
        labels: y, class indices, shape [N, ...]; -100 does not count.
        items: n, labels that count in all micro-batches of the optimizer step (and
            all processes, where the Trainer averages over them); None takes the mean
            over these labels.
        shift: Whether position i predicts label i + 1.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Returns:
        The loss in nats, shape [].

    Raises:
        RegradError: If the labels are not class indices for every position, if the model has
            another loss besides cross entropy, or if there is one n per GPU.
    """
    logits = _logits_of(outputs)
    if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        got = "none" if labels is None else f"{list(labels.shape)} of {labels.dtype}"
        raise RegradError(
            f"labels must be class indices of shape {list(logits.shape[:-1])}, "
            f"got {got}; {OWN_LOSS}"
        )
    if isinstance(outputs, dict) and outputs.get("aux_loss") is not None:
        raise RegradError(
            f"loss must be cross entropy alone, got a model that adds its aux_loss; {OWN_LOSS}"
        )
    if isinstance(items, Tensor) and items.numel() > 1:
        raise RegradError(
            "loss must come from one GPU per process, got several; start with torchrun"
        )
    if shift:
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    loss = criterion(
        # float32 as in the models: in half precision the sum would lose digits
        logits.float().reshape(-1, logits.shape[-1]),
        labels.to(logits.device).reshape(-1),
        ignore_index=IGNORED,
        reduction="mean" if items is None else "sum",
        label_smoothing=label_smoothing,
    )
    if items is None:
        return loss
    if isinstance(items, Tensor):
        items = items.to(loss.device)
    return loss / items
