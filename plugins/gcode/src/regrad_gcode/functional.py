r"""The extra gradient of a branch, and how it joins a layer's gradient, as functions of tensors.

Symbols: h the hidden state before a stage, g the loss's gradient with respect to the one
after it, r the gradient with respect to h as it comes (:math:`J_{stage}^\top g`, and what
else reads h), e the branch's part :math:`\lambda J_{branch}^\top g`. Norms are of one
sample (dimension 0), so that micro-batches and ranks give the numbers of the whole batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def pull_back(
    branch: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor, *, dtype: torch.dtype
) -> Tensor:
    r"""Return :math:`J_{branch}^\top g`, in full precision even where autocast is on.

    Args:
        branch: Maps h to b.
        hidden: h, shape [B, C, H, W]. Its graph is not touched.
        gradient: g, shape of b.
        dtype: What the branch computes in.

    Returns:
        Shape of `hidden`, in `dtype`.

    Example:
        >>> pull_back(torch.square, torch.tensor([3.0]), torch.tensor([2.0]), dtype=torch.float32)
        tensor([12.])
    """
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        start = hidden.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(branch(start), start, gradient.detach().to(dtype))[0]


@torch.no_grad()
def add_flow(gradient: Tensor, extra: Tensor, *, keep_norm: bool = False) -> Tensor:
    r"""Return r + e; with `keep_norm` each sample rescaled to the norm of r.

    Args:
        gradient: r, shape [B, *].
        extra: e, same shape.
        keep_norm: Whether to rescale.

    Returns:
        Shape and dtype of `gradient`; the sum is taken in the wider of both dtypes.

    Example:
        >>> r, e = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -4.0]])
        >>> add_flow(r, e), add_flow(r, e, keep_norm=True)
        (tensor([[3., 0.]]), tensor([[5., 0.]]))
    """
    total = gradient + extra
    if keep_norm:
        total = total * _ratio(_sample_norms(gradient), _sample_norms(total))
    return total.to(gradient.dtype)


@torch.no_grad()
def scale_flow(gradient: Tensor, extra: Tensor) -> Tensor:
    r"""Return r, each sample scaled by :math:`|r + e| / |r|`: the control, without e's direction.

    Args:
        gradient: r, shape [B, *].
        extra: e, same shape.

    Returns:
        Shape and dtype of `gradient`; a sample with r = 0 stays 0.

    Example:
        >>> scale_flow(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 8.0]]))  # |(5, 12)| / 5
        tensor([[ 7.8000, 10.4000]])
    """
    scale = _ratio(_sample_norms(gradient + extra), _sample_norms(gradient))
    return (gradient * scale).to(gradient.dtype)


def _sample_norms(tensor: Tensor) -> Tensor:
    """Return norms [B, 1, …] in float32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    dims = tuple(range(1, tensor.dim()))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)
    return norms


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """Return one / other, and 1 where the other is 0."""
    return torch.where(other > 0, one / other, 1.0)
