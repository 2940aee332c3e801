"""Boosted exits as functions: the prediction of each exit, and the loss that trains them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def check_decay(decay: float) -> None:
    """Raise `ValueError` unless `decay` is in [0, 1]."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay!r}; 0 is the plain sum of losses")


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless `alpha` is in (0, 1]."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}; 1 is plain cross entropy")


def check_exit_weights(exit_weights: Sequence[float]) -> None:
    """Raise `ValueError` unless every weight is positive and finite."""
    for weight in exit_weights:
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"exit_weights must be positive and finite, got {tuple(exit_weights)!r}; "
                "leave them out to count every exit alike"
            )


def running_sum(outputs: Sequence[Tensor], *, decay: float = 0.5) -> list[Tensor]:
    r"""Return the prediction of every exit: its own output on top of the earlier ones.

    .. math:: F_n = z_n + \tau F_{n-1}, \qquad F_0 = 0.

    Exit n of a boosted network is an increment, not a classifier: evaluate :math:`F_n`, never
    :math:`z_n` alone.

    Args:
        outputs: :math:`z_1, \dots, z_N`, the logits of the exits in the order of their depth, each
            [N, C, ...], all of one shape.
        decay: :math:`\tau` in [0, 1]; 0 returns the outputs themselves.

    Returns:
        :math:`F_1, \dots, F_N`, of the same shape, in float32 at least. Gradients flow through all
        of it.

    Raises:
        TypeError: If `outputs` is not a sequence of tensors.
        ValueError: If it is empty, the shapes differ, or `decay` is out of range.

    Example:
        >>> first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[-0.5, 1.0]])
        >>> running_sum([first, second])
        [tensor([[2., 0.]]), tensor([[0.5000, 1.0000]])]

    References:
        Yu, Li, Hua, Huang and Shi, 2023, "Boosted Dynamic Neural Networks"
        (arXiv 2211.16726). The published code multiplies by the rate of the exit before in training
        and by that of the exit itself in evaluation; both are this where all rates are equal.
    """
    return _sums(outputs, decay, is_stopped=False)


def boosted_logits(outputs: Sequence[Tensor], *, decay: float = 0.5) -> list[Tensor]:
    r"""Return what the loss of each exit sees.

    .. math:: z_n + \tau\,\mathrm{stop}(F_{n-1})

    The values are those of `running_sum`; a gradient reaches :math:`z_n` alone, so that an exit
    does not change what the exits before it have said.

    Args:
        outputs: :math:`z_1, \dots, z_N`, each [N, C, ...], all of one shape.
        decay: :math:`\tau` in [0, 1].

    Returns:
        As many tensors of the same shape.

    Raises:
        TypeError: If `outputs` is not a sequence of tensors.
        ValueError: If it is empty, the shapes differ, or `decay` is out of range.

    Example:
        >>> first = torch.zeros(1, 2, requires_grad=True)
        >>> second = torch.zeros(1, 2, requires_grad=True)
        >>> boosted_logits([first, second])[1].sum().backward()
        >>> first.grad is None, second.grad
        (True, tensor([[1., 1.]]))
    """
    return _sums(outputs, decay, is_stopped=True)


def _sums(outputs: Sequence[Tensor], decay: float, *, is_stopped: bool) -> list[Tensor]:
    """Return the running sums, through which gradients flow unless they are stopped."""
    check_decay(decay)
    _check_outputs(outputs)
    if decay == 0:
        return list(outputs)  # not + 0 * F, which infinite logits would make NaN
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    wide = [output.to(dtype) for output in outputs]
    sums = [wide[0]]
    for output in wide[1:]:
        before = sums[-1].detach() if is_stopped else sums[-1]
        sums.append(torch.add(output, before, alpha=decay))
    return sums


def exit_loss(logits: Tensor, target: Tensor, *, alpha: float = 1.0, **settings: Any) -> Tensor:
    r"""Return the cross entropy of one exit, on request with the gradient of a flattened softmax.

    With :math:`\alpha < 1` the logit gradient :math:`c\,(\mathrm{softmax}(z) - q)` becomes
    :math:`c\,(\mathrm{softmax}(\alpha z) - q)`, the PowerGrad transform; the value stays plain.

    Args:
        logits: What the loss of the exit sees, shape [N, C, ...].
        target: As for `torch.nn.functional.cross_entropy`.
        alpha: :math:`\alpha` in (0, 1]; 1 is plain cross entropy.
        **settings: Of `torch.nn.functional.cross_entropy`: `weight`, `ignore_index`, `reduction`,
            `label_smoothing`.

    Returns:
        The loss in nats, of the shape that torch's has.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> exit_loss(logits, torch.tensor([0]), alpha=0.5).backward()
        >>> logits.grad  # softmax(z / 2) = [.7311, .2689] minus the target [1, 0]
        tensor([[-0.2689,  0.2689]])

    References:
        Das et al., 2021, "Altering Backward Pass Gradients improves Convergence" (arXiv
        2111.12495).
    """
    plain = F.cross_entropy(logits, target, **settings)
    if alpha == 1:
        return plain
    flattened = F.cross_entropy(alpha * logits, target, **settings) / alpha
    return plain.detach() + (flattened - flattened.detach())


def boosted_cross_entropy(
    outputs: Sequence[Tensor],
    target: Tensor,
    *,
    decay: float = 0.5,
    exit_weights: Sequence[float] | None = None,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the sum of the exits' losses, each at what the exits before it leave.

    .. math:: \sum_n w_n\,\mathrm{CE}\bigl(z_n + \tau\,\mathrm{stop}(F_{n-1}), y\bigr),
        \qquad F_n = z_n + \tau F_{n-1}.

    Args:
        outputs: :math:`z_1, \dots, z_N`, the logits of the exits in the order of their depth, each
            [N, C, ...], all of one shape.
        target: Of every exit: class indices or probabilities, as for
            `torch.nn.functional.cross_entropy`.
        decay: :math:`\tau` in [0, 1]; 0 is the plain sum of losses.
        exit_weights: :math:`w_n`, positive, one per exit; None for 1 each.
        alpha: Exponent in (0, 1] of the flattened softmax in the gradient, see `exit_loss`; 1 is
            plain cross entropy.
        weight: Weight of each class, shape [C].
        ignore_index: Class index whose rows do not count.
        reduction: "none", "mean" or "sum", over rows; the losses of the exits are added.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Returns:
        The loss in nats: shape [], or with "none" the shape of the class indices.

    Raises:
        TypeError: If `outputs` is not a sequence of tensors.
        ValueError: If it is empty, the shapes differ, or a number is out of range.

    Example:
        >>> first = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> second = torch.zeros(1, 2, requires_grad=True)
        >>> boosted_cross_entropy([first, second], torch.tensor([0])).backward()
        >>> second.grad  # at softmax(z / 2) of the first exit, which is .7311 sure already
        tensor([[-0.2689,  0.2689]])

    References:
        Yu, Li, Hua, Huang and Shi, 2023, "Boosted Dynamic Neural Networks"
        (arXiv 2211.16726), which calls :math:`\tau` the temperature of prediction reweighting.
    """
    check_alpha(alpha)
    losses = [
        exit_loss(
            logits,
            target,
            alpha=alpha,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        for logits in boosted_logits(outputs, decay=decay)
    ]
    return weighted_sum(losses, exit_weights)


def weighted_sum(losses: Sequence[Tensor], exit_weights: Sequence[float] | None = None) -> Tensor:
    """Add the losses of the exits.

    Args:
        losses: One per exit, all of one shape.
        exit_weights: Positive, one per exit; None or none at all for 1 each.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: If there are not as many weights as exits, or one is out of range.

    Example:
        >>> weighted_sum([torch.tensor(1.0), torch.tensor(2.0)], [1.0, 0.5])
        tensor(2.)
    """
    if exit_weights:
        check_exit_weights(exit_weights)
        if len(exit_weights) != len(losses):
            raise ValueError(
                f"exit_weights must hold one number per exit, got {tuple(exit_weights)!r} "
                f"for {len(losses)} exits"
            )
        losses = [weight * loss for weight, loss in zip(exit_weights, losses, strict=True)]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def _check_outputs(outputs: Sequence[Tensor]) -> None:
    """Raise unless there is at least one exit, and all are tensors of one shape."""
    if not isinstance(outputs, list | tuple):
        raise TypeError(
            "outputs must be a tuple or list of logits, one tensor per exit, "
            f"got {type(outputs).__name__}; put the logits of a single exit into a list"
        )
    if not outputs:
        raise ValueError("outputs must hold the logits of at least one exit, got none")
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"outputs must hold tensors, got {type(output).__name__} among them; "
                "return the logits of the exits alone"
            )
        if output.shape != outputs[0].shape:
            shapes = [list(each.shape) for each in outputs]
            raise ValueError(f"outputs must all be of one shape, got {shapes}")
