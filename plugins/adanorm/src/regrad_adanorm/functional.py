r"""AdaNorm's rule on the norms of many tensors at once, and what it adds to them.

Everything stays on the device of the tensors. On a CPU, where reading a number
costs nothing, tensors that the rule leaves alone are not touched at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from regrad.sharding import is_sharded, locals_of, row_norms
from torch import Tensor


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor, exact where it is sharded.

    Args:
        tensors: n tensors of one device and dtype, plain or DTensor; at least one.

    Returns:
        Shape [n], float32 at least.

    Example:
        >>> norms_of([torch.tensor([3.0, 4.0]), torch.zeros(2, 2)])
        tensor([5., 0.])
    """
    if any(map(is_sharded, tensors)):
        return torch.stack([row_norms(tensor, axis=None).reshape(()) for tensor in tensors])
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype))


@torch.no_grad()
def average_and_excess(
    norms: Tensor, averages: Tensor, *, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Advance the averages of norms, and say by how much each gradient is too short.

    .. math:: e \leftarrow \gamma e + (1-\gamma)|g|, \qquad
        s = g \max(1, e/|g|) = (1 + x)\, g.

    Args:
        norms: :math:`|g|` of n gradients, shape [n], not negative.
        averages: e of the step before, shape [n]; 0 at first.
        decay: :math:`\gamma` in [0, 1).

    Returns:
        The new e, shape [n], and the excess x, shape [n]: 0 where the norm is not
        below its average, and where it is 0 (a zero gradient has no direction).
        A norm that is not finite leaves its average unchanged.

    Example:
        >>> average_and_excess(torch.tensor([1.0, 4.0, 0.0]), torch.full((3,), 3.0), decay=0.5)
        (tensor([2.0000, 3.5000, 1.5000]), tensor([1., 0., 0.]))

    References:
        Dubey, Singh and Chaudhuri, 2023, "AdaNorm: Adaptive Gradient Norm Correction
        based Optimizer for CNNs", AdamNorm. We differ where the norm is 0 or not
        finite.
    """
    moved = torch.where(norms.isfinite(), decay * averages + (1 - decay) * norms, averages)
    short = (moved > norms) & (norms > 0)
    excess = (moved - norms) / norms
    # masked_fill_ passes its number to the kernel; torch.where would copy it and wait.
    return moved, excess.masked_fill_(~short, 0.0)


@torch.no_grad()
def add_scaled_(targets: Sequence[Tensor], tensors: Sequence[Tensor], factors: Tensor) -> None:
    r"""Add to each target its factor times its tensor, :math:`X_i \leftarrow X_i + f_i Y_i`.

    Args:
        targets: n tensors X, plain or DTensor, of one device and dtype. Overwritten.
        tensors: n tensors Y of the same shapes and layouts. May be the targets.
        factors: f, shape [n], on the same device, bounded by the range of the dtype.

    Example:
        >>> weights = [torch.ones(2), torch.ones(1)]
        >>> tensors = [torch.tensor([1.0, 2.0]), torch.ones(1)]
        >>> add_scaled_(weights, tensors, torch.tensor([0.5, 0.0]))
        >>> weights
        [tensor([1.5000, 2.0000]), tensor([1.])]
    """
    targets = locals_of(targets)
    tensors = locals_of(tensors)
    if factors.device.type == "cpu":
        for target, tensor, factor in zip(targets, tensors, factors.tolist(), strict=True):
            if factor:
                target.add_(tensor, alpha=factor)
        return
    for target, tensor, factor in zip(targets, tensors, factors.unbind(), strict=True):
        target.addcmul_(tensor, factor)
