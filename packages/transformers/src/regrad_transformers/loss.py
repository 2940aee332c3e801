"""The cross entropy that a Trainer's model computes inside, with a criterion that can be corrected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regrad.errors import RegradError
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

IGNORED = -100
OWN_LOSS = "write a compute_loss_func of your own that calls callback.criterion"


def shifts_labels(model: Any) -> bool:
    """Say whether the model's own loss compares each position with the next label, as the Trainer decides it too."""
    aligned = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return (
        LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss and not aligned
    )


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
        RegradError: If the labels are no class indices of every position, if the
            model has a loss beside cross entropy, or if there is one n per GPU.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        got = "none" if labels is None else f"{list(labels.shape)} of {labels.dtype}"
        raise RegradError(
            f"labels must be class indices of shape {list(logits.shape[:-1])}, got {got}; {OWN_LOSS}"
        )
    if isinstance(outputs, dict) and outputs.get("aux_loss") is not None:
        raise RegradError(
            f"loss must be cross entropy alone, got a model that adds its aux_loss; {OWN_LOSS}"
        )
    if isinstance(items, Tensor) and items.numel() > 1:
        raise RegradError("loss must be of one GPU per process, got several; start with torchrun")
    if shift:
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    loss = criterion(
        logits.float().reshape(
            -1, logits.shape[-1]
        ),  # as the models do: in half precision the sum would lose digits
        labels.to(logits.device).reshape(-1),
        ignore_index=IGNORED,
        reduction="mean" if items is None else "sum",
        label_smoothing=label_smoothing,
    )
    return (
        loss
        if items is None
        else loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    )
