r"""AdaFisher's sums, averages and divisor, as functions of tensors.

Symbols: h the input of a layer, s the loss's gradient with respect to its output, H and S the
averages of their normalised second moments, F the divisor. A row is one sample of a linear layer
(and one token, one position), or one position of a convolution's output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Average = Literal["published", "ema"]

KEPT = 0.08
ADDED = 0.008
DECAY = 0.92
FLOOR = 1e-6


@torch.no_grad()
def sum_of_squares(tensor: Tensor, *, axis: int) -> Tensor:
    r"""Return the sum over rows of the squares of each feature, :math:`\sum_r x_{rj}^2`.

    Args:
        tensor: x, shape [*, n, *].
        axis: The dimension that counts the features; negative from the end.

    Returns:
        Shape [n].

    Example:
        >>> sum_of_squares(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), axis=-1)
        tensor([1., 5.])
    """
    return sum_over_rows(tensor.square(), axis=axis)


@torch.no_grad()
def sum_over_rows(tensor: Tensor, *, axis: int) -> Tensor:
    r"""Return the sum over rows of each feature, :math:`\sum_r x_{rj}`.

    Args:
        tensor: x, shape [*, n, *].
        axis: The dimension that counts the features; negative from the end.

    Returns:
        Shape [n].

    Example:
        >>> sum_over_rows(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), axis=-1)
        tensor([1., 3.])
    """
    features = tensor.movedim(axis, 0)
    return features.reshape(len(features), -1).sum(dim=1)


@torch.no_grad()
def sum_of_patch_squares(
    images: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    padding_mode: str = "zeros",
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    r"""Return the sum over positions of the squares of what a convolution multiplies there.

    These are the sums of squares of the columns that `torch.nn.Unfold` makes. They are not made
    here: padding and strides only choose elements, so squares are summed over the samples first.

    Args:
        images: h, shape [B, C, H, W].
        kernel_size: Rows and columns of the kernel.
        stride: Down and across.
        padding: Left, right, top and bottom.
        padding_mode: As `torch.nn.Conv2d` calls it.
        dilation: Down and across.

    Returns:
        Shape [C · rows · columns], in the order of the weight of one output.

    Example:
        >>> sum_of_patch_squares(torch.tensor([[[[1.0, 2.0, 3.0]]]]), kernel_size=(1, 2))
        tensor([ 5., 13.])
    """
    squares = images.square().sum(dim=0, keepdim=True)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = functional.pad(squares, padding, mode=mode)[0]
    height = _last_start(padded.shape[1], kernel_size[0], stride[0], dilation[0])
    width = _last_start(padded.shape[2], kernel_size[1], stride[1], dilation[1])
    sums: list[Tensor] = []
    for row in range(kernel_size[0]):
        top = row * dilation[0]
        for column in range(kernel_size[1]):
            left = column * dilation[1]
            seen = padded[
                :, top : top + height + 1 : stride[0], left : left + width + 1 : stride[1]
            ]
            sums.append(seen.sum(dim=(1, 2)))
    return torch.stack(sums, dim=1).flatten()


def _last_start(length: int, kernel: int, stride: int, dilation: int) -> int:
    """Return where the kernel begins at its last position."""
    return (length - dilation * (kernel - 1) - 1) // stride * stride


@torch.no_grad()
def channel_sums(inputs: Tensor) -> Tensor:
    r"""Return :math:`u_c = \sum_{b,p} h_{bcp} / P^2`, with P positions p per sample and channel.

    Args:
        inputs: h, shape [B, C, *].

    Returns:
        u, shape [C].

    Example:
        >>> channel_sums(torch.tensor([[[1.0, 3.0], [0.0, 2.0]]]))
        tensor([1.0000, 0.5000])
    """
    positions = inputs.shape[2:].numel()
    return sum_over_rows(inputs, axis=1) / positions**2


@torch.no_grad()
def normalise(values: Tensor, *, floor: float = FLOOR, relative: bool = False) -> Tensor:
    r"""Return :math:`(x - \min x)/(\max x - \min x + \epsilon)`, in [0, 1).

    Args:
        values: x, shape [n], not negative. Plus infinity counts as 1, minus infinity as 0.
        floor: :math:`\epsilon`. Positive.
        relative: Whether `floor` is in units of max x. Then a factor on x changes nothing, and
            zeros stay zeros.

    Returns:
        Shape [n].

    Example:
        >>> normalise(torch.tensor([1.0, 2.0, 3.0]), floor=1.0)
        tensor([0.0000, 0.3333, 0.6667])
    """
    finite = values.nan_to_num(nan=torch.nan, posinf=1.0, neginf=0.0)
    low, high = finite.aminmax()
    spread = high - low + (floor * high if relative else floor)
    return torch.where(spread == 0, 0.0, (finite - low) / spread)


@torch.no_grad()
def advance(previous: Tensor | None, moment: Tensor, *, average: Average = "published") -> Tensor:
    r"""Return the average of normalised second moments after one refresh.

    "published": :math:`H \leftarrow .08\,H + .008\,\hat H` from :math:`H_0 = 1`, whose weights sum
    to .088. "ema": :math:`H \leftarrow .92\,H + .08\,\hat H` from :math:`H_0 = \hat H`.

    Args:
        previous: H, shape [n]; None before the first refresh.
        moment: The second moment before `normalise`, shape [n]. With a NaN in it, H stays;
            at the first refresh it counts as 0, or as 1 with "published".
        average: Which of both. The floor of `normalise` is absolute with the first, and relative
            with the second.

    Returns:
        The new H, shape [n].

    Example:
        >>> moment = torch.tensor([0.0, 4.0])
        >>> advance(None, moment, average="published")
        tensor([0.0800, 0.0880])
        >>> advance(torch.tensor([0.5, 0.5]), moment, average="ema")
        tensor([0.4600, 0.5400])

    References:
        Gomes, Zhang, Belilovsky, Wolf and Hosseini, 2025, "AdaFisher: Adaptive Second Order
        Optimization via Fisher Information", whose average is "published". "ema" is ours.
    """
    seen = normalise(moment, relative=average == "ema")
    if average == "published":
        before = torch.ones_like(moment) if previous is None else previous
        after = KEPT * before + ADDED * seen
    else:
        before = seen.nan_to_num(nan=0.0) if previous is None else previous
        after = DECAY * before + (1 - DECAY) * seen
    return torch.where(moment.isnan().any(), before, after)


@torch.no_grad()
def relative_divisor(outputs: Tensor, inputs: Tensor, *, damping: float = 1e-3) -> Tensor:
    r"""Return :math:`F/\lambda = S \otimes H/\lambda + 1`.

    Args:
        outputs: S, shape [O].
        inputs: H of the weight or of the bias, shape [I].
        damping: :math:`\lambda`. Positive.

    Returns:
        Shape [O, I].

    Example:
        >>> relative_divisor(torch.tensor([0.5]), torch.tensor([0.0, 1.0]), damping=0.5)
        tensor([[1., 2.]])
    """
    return torch.outer(outputs / damping, inputs).add_(1)
