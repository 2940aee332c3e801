"""Means per output, exact on shards, and gradients without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from regrad.sharding import is_sharded, local, locals_of, sum_over_shards
from torch import Tensor


class Unit(NamedTuple):
    """What belongs to one output of a layer.

    Attributes:
        axis: Dimension that counts the outputs.
        groups: Into how many equal parts dimension 0 is divided first, each with its own outputs.
    """

    axis: int = 0
    groups: int = 1


@torch.no_grad()
def centralize_(grad: Tensor) -> Tensor:
    r"""Subtract from `grad`, in place, the mean of each of its rows.

    For index :math:`i` of dimension 0 of the gradient G, with M elements each,

    .. math:: G_i \leftarrow G_i - \frac{1}{M} \sum_j G_{ij}.

    Args:
        grad: Gradient G, shape [O, *], plain or DTensor. Overwritten, unless it has
            fewer than two dimensions: then there is nothing to centre.

    Returns:
        `grad` itself.

    Raises:
        ValueError: If it is a DTensor that is a pending sum over processes.

    Example:
        >>> centralize_(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    References:
        Yong, Huang, Hua and Zhang, 2020, "Gradient Centralization: A New Optimization
        Technique for Deep Neural Networks", equation 1. A transposed convolution has
        its outputs in dimension 1: transpose its gradient first, as the correction
        does and the published code does not.
    """
    if grad.dim() > 1:
        subtract_([grad], [unit_means(grad, Unit())])
    return grad


@torch.no_grad()
def unit_means(tensor: Any, unit: Unit) -> Tensor:
    """Return the mean of each unit of `tensor`, exact where it is a shard.

    Args:
        tensor: Shape [d_0, …, d_n], n at least 1, plain or DTensor.
        unit: What a unit of it is.

    Returns:
        A plain tensor in float32 at least, which broadcasts against the local part.

    Raises:
        ValueError: If the tensor is a pending sum over processes.

    Example:
        >>> unit_means(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), Unit(axis=1))
        tensor([[3., 5.]])
    """
    if unit.groups > 1:
        return _grouped_means(tensor, unit)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    dims = [dim for dim in range(tensor.dim()) if dim != unit.axis]
    sums = local(tensor).sum(dims, keepdim=True, dtype=dtype)
    elements = tensor.numel() / tensor.shape[unit.axis]
    return sum_over_shards(sums, tensor, unit.axis).div_(elements)


def _grouped_means(tensor: Any, unit: Unit) -> Tensor:
    """Return the means of units that dimension 0 holds several groups of."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    groups = whole.unflatten(0, (unit.groups, -1))
    dims = [dim for dim in range(1, groups.dim()) if dim != unit.axis + 1]
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    means = groups.mean(dims, keepdim=True, dtype=dtype)
    spread = means.expand(-1, groups.shape[1], *means.shape[2:]).flatten(0, 1)
    return _part_of(spread, tensor) if is_sharded(tensor) else spread


def _part_of(whole: Tensor, like: Any) -> Tensor:
    """Return this process's part of `whole`, which broadcasts against all of `like`."""
    # Imported here because it is heavy and only shards need it.
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(
        whole.expand(like.shape), like.device_mesh, everywhere, run_check=False
    )
    return local(spread.redistribute(placements=like.placements))


@torch.no_grad()
def subtract_(grads: Sequence[Tensor], means: Sequence[Tensor]) -> None:
    """Subtract from each gradient its means, in place.

    Args:
        grads: n gradients, plain or DTensor. Overwritten.
        means: n plain tensors that broadcast against their local parts.
    """
    if grads:
        torch._foreach_sub_(locals_of(grads), list(means))
