"""Tensors that may be shards: local views, and norms that are exact on them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer


def is_sharded(tensor: Tensor) -> bool:
    """Say whether `tensor` is a DTensor, without importing what only shards need."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds: a view, so in-place changes show."""
    return getattr(tensor, "_local_tensor", tensor)


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return `local` of each tensor."""
    return [local(tensor) for tensor in tensors]


def with_part(tensor: Any, part: Tensor) -> Tensor:
    """Return a part of this process as a tensor that is cut as another is.

    Args:
        tensor: Plain or DTensor.
        part: Like its local part.

    Returns:
        `part` itself if the tensor is plain, else a DTensor that shows it.

    Example:
        >>> import torch
        >>> with_part(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return part
    # Heavy to import, and only shards need it.
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def sum_over_shards(values: Tensor, tensor: Any, kept: int | None = None) -> Tensor:
    """Add, in place, what each process computed from its own part of `tensor`.

    Args:
        values: Any shape, the same on all processes. Overwritten.
        tensor: Plain (nothing is to be added) or DTensor.
        kept: Dimension whose parts have values of their own; None for none.

    Returns:
        `values` itself.

    Raises:
        ValueError: If the tensor is a pending sum over processes.

    Example:
        >>> import torch
        >>> from regrad.sharding import sum_over_shards
        >>> sum_over_shards(torch.tensor([5.0]), torch.tensor([1.0, 2.0]))
        tensor([5.])
    """
    for mesh_dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_partial():
            raise ValueError(
                "tensor must not be a pending sum; reduce it before its norms are read"
            )
        # Tensor parallelism makes a _StridedShard of FSDP's dimension: no Shard, but with a dim.
        dim = getattr(placement, "dim", None)
        if dim is not None and dim != kept:
            distributed.all_reduce(values, group=tensor.device_mesh.get_group(mesh_dim))
    return values


@torch.no_grad()
def reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each `.grad` its parameter's layout: under sequence parallelism it is a pending sum.

    Collective where a layout differs: every process must call it for the same
    parameters in the same order.

    Args:
        parameters: Plain (left alone) or DTensors. Their `.grad` is replaced where its
            placements are not the parameter's.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            reduced = _laid_out_as(parameter, parameter.grad)
            if reduced is not parameter.grad:
                parameter.grad = reduced


@torch.no_grad()
def reduce_states(optimizer: Optimizer) -> None:
    """Give the optimizer's state the layout of its parameters.

    Steps before attach leave pending sums in it. Collective where a layout differs, as
    `reduce_gradients` is.

    Args:
        optimizer: Its state is changed where a tensor's placements are not its
            parameter's.
    """
    for parameter, state in optimizer.state.items():
        if not is_sharded(parameter):
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = _laid_out_as(parameter, value)


def _laid_out_as(parameter: Any, tensor: Any) -> Any:
    """Return `tensor`, redistributed if both are DTensors with different placements."""
    if not (is_sharded(parameter) and is_sharded(tensor)):
        return tensor
    if tensor.placements == parameter.placements:
        return tensor
    return tensor.redistribute(placements=parameter.placements)


@torch.no_grad()
def row_norms(tensor: Tensor, axis: int | None = 0) -> Tensor:
    r"""Return the norm of each unit of `tensor`, exact if it is cut into shards.

    Args:
        tensor: Shape [d_0, …, d_n], plain or DTensor.
        axis: Dimension that counts the units; None makes the whole tensor one unit.

    Returns:
        Norms :math:`\|X_i\|` in float32 at least, a plain tensor of the local
        shape with every dimension but `axis` reduced to 1, so that it broadcasts
        against the local part.

    Raises:
        ValueError: If the tensor is a pending sum over processes.

    Example:
        >>> import torch
        >>> from regrad.sharding import row_norms
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    part = local(tensor)
    kept = None
    if axis is not None and part.dim() > 0:
        kept = axis % part.dim()
    norms = _norms_over([d for d in range(part.dim()) if d != kept], part)
    if not is_sharded(tensor):
        return norms
    return sum_over_shards(norms.square(), tensor, kept).sqrt()


def _norms_over(dims: Sequence[int], part: Tensor) -> Tensor:
    """Return the norms over some dimensions, which are kept with length 1."""
    dtype = torch.promote_types(part.dtype, torch.float32)
    if not dims:  # torch would take no dimension for all of them
        return part.abs().to(dtype)
    norms: Tensor = torch.linalg.vector_norm(part, dim=list(dims), keepdim=True, dtype=dtype)
    return norms


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, exact if they are cut into shards.

    Args:
        tensors: Any shapes, plain or DTensor. May be empty.

    Returns:
        A scalar in float32 at least, on the device of the first tensor.

    Example:
        >>> import torch
        >>> from regrad.sharding import total_norm
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    dtype = torch.float32
    by_layout: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
        mesh = getattr(tensor, "device_mesh", None)
        placements = getattr(tensor, "placements", None)
        by_layout[mesh, placements, local(tensor).device].append(tensor)
    squares = [_total_square(alike, dtype) for alike in by_layout.values()]
    device = squares[0].device
    return torch.stack([square.to(device) for square in squares]).sum().sqrt()


def _total_square(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the squared norm of tensors of one layout and device together, a scalar."""
    norms = torch.stack(torch._foreach_norm(locals_of(tensors), 2, dtype))
    return sum_over_shards(norms.square().sum(), tensors[0])
