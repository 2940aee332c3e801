"""PowerGrad as a loss module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrad_powergrad.functional import check_alpha, power_grad_cross_entropy


class PowerGradCrossEntropyLoss(nn.CrossEntropyLoss):
    r"""`nn.CrossEntropyLoss` with the gradient of a flattened softmax.

    In training and in evaluation mode the value is plain cross entropy; the logit
    gradient is :math:`c\,(\mathrm{softmax}(\alpha z) - q)` instead of
    :math:`c\,(\mathrm{softmax}(z) - q)`. See
    `regrad_powergrad.functional.power_grad_cross_entropy` for the rule, the shapes
    and the reference.

    A model trained with it is over-confident under softmax(z); the probabilities that
    were fitted are softmax(alpha z), which `probabilities` returns.

    Args:
        weight: Weight of each class, shape [C]. A buffer: it moves with the module.
        alpha: :math:`\alpha` in (0, 1]; 1 is `nn.CrossEntropyLoss`.
        ignore_index: Class index whose rows do not count.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Raises:
        ValueError: If `alpha` is not in (0, 1]; on call as the functional does.

    Example:
        >>> criterion = PowerGradCrossEntropyLoss(alpha=0.5)
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> criterion(logits, torch.tensor([0])).backward()
        >>> logits.grad
        tensor([[-0.2689,  0.2689]])
        >>> criterion.probabilities(logits.detach())
        tensor([[0.7311, 0.2689]])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float = 0.25,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        check_alpha(alpha)
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.alpha = alpha

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - as in nn
        """Return the loss of logits `input`, shape [N, C, ...], against `target`."""
        return with_settings_of(self, input, target, alpha=self.alpha)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return softmax(alpha z) of `logits` [C] or [N, C, ...], the probabilities it fits."""
        return calibrated(logits, self.alpha)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"alpha={self.alpha}"


def with_settings_of(
    criterion: nn.CrossEntropyLoss, logits: Tensor, target: Tensor, *, alpha: float
) -> Tensor:
    """Return the PowerGrad loss with the arguments that `criterion` has now."""
    return power_grad_cross_entropy(
        logits,
        target,
        alpha=alpha,
        weight=criterion.weight,
        ignore_index=criterion.ignore_index,
        reduction=criterion.reduction,
        label_smoothing=criterion.label_smoothing,
    )


def calibrated(logits: Tensor, alpha: float) -> Tensor:
    """Return softmax(alpha z) over the classes of `logits`, shape [C] or [N, C, ...]."""
    return torch.softmax(logits * alpha, dim=min(logits.dim() - 1, 1))
