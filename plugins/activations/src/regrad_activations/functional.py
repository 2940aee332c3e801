r"""Short forms of a matrix whose rows are summed over, as functions of tensors.

The weight gradient of a linear layer is :math:`G^\top H = \sum_i G_i \otimes H_i` over the rows of
its input H and of its output's gradient G. A sample of k rows with weights gives an unbiased
estimate; int8 keeps every row to a relative error of 1/254 of its largest element.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def row_probabilities(norms: Tensor) -> Tensor:
    r"""Return probabilities :math:`p_i = n_i / \sum_j n_j`; equal ones where all norms are 0.

    Args:
        norms: n, shape [M], at least 0.

    Returns:
        Shape [M], float64, with sum 1; NaN where a norm is not finite.

    Example:
        >>> row_probabilities(torch.tensor([3.0, 1.0]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
        >>> row_probabilities(torch.zeros(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)

    References:
        The published code of WTA-CRS adds 1e-8 to norms and sum, so that small norms have
        probabilities with a sum above 1. Here the sum is 1.
    """
    wide = norms.double()
    total = wide.sum()
    return torch.where(total == 0, 1 / max(norms.numel(), 1), wide / total)


def winners(sorted_probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""Return how many of the most probable rows to keep for certain, and the score of each number.

    With p falling and :math:`P_n` the sum of its first n, the score is
    :math:`(1 - P_n)/(k - n)`, and the number :math:`n^*` has the least one.

    Args:
        sorted_probabilities: p, shape [M], falling, with sum 1.
        count: k, in [1, M].

    Returns:
        :math:`n^*`, a scalar, and the scores, shape [k].

    Example:
        >>> winners(torch.tensor([0.8, 0.1, 0.1]), 2)[0]
        tensor(1)
    """
    # Summed from the small ones, so that no rest is below 0.
    rests = sorted_probabilities.flip(0).cumsum(0).flip(0)[:count]
    numbers = torch.arange(count, device=rests.device)
    scores = rests / (count - numbers)
    return scores.argmin(), scores


def choose_by_weight(
    probabilities: Tensor, count: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Choose rows by WTA-CRS: the most probable ones for certain, the rest with replacement.

    The first :math:`n^*` rows (see `winners`) have the weight 1. Each of the k − n* others is drawn
    in proportion to p, and row j has the weight :math:`(1 - P_{n^*}) / (p_j (k - n^*))`.

    Args:
        probabilities: p, shape [M], with sum 1.
        count: k, in [1, M].
        generator: Of the device of `probabilities`.

    Returns:
        Indices of rows, shape [k]; their weights, shape [k]; and n*, a scalar. Nothing waits for
        the device.

    Example:
        >>> rows, weights, certain = choose_by_weight(torch.tensor([0.1, 0.8, 0.1]), 2)
        >>> rows[0], weights
        (tensor(1), tensor([1., 2.]))

    References:
        Liu et al., 2023, "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of
        Language Model" (arXiv 2305.15265). The published code leaves the weights out in the first
        epoch and the drawn rows out where P is above .999; here neither.
    """
    ordered, order = probabilities.sort(descending=True, stable=True)
    certain, _ = winners(ordered, count)
    places = torch.arange(ordered.numel(), device=ordered.device)
    drawable = torch.where(places >= certain, ordered, 0)
    sums = drawable.cumsum(0)
    total = sums[-1]
    draws = torch.rand(count, dtype=sums.dtype, device=sums.device, generator=generator) * total
    # Rounding must not lead to a row without probability.
    last = (ordered > 0).sum().clamp_min(1) - 1
    drawn = torch.minimum(torch.searchsorted(sums, draws, right=True), last)
    chosen = torch.arange(count, device=ordered.device)
    is_certain = chosen < certain
    picked = torch.where(is_certain, chosen, drawn)
    weights = torch.where(is_certain, 1.0, total / (ordered[picked] * (count - certain)))
    return order[picked], weights, certain


def choose_uniformly(
    rows: int,
    count: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Choose `count` of `rows` rows without replacement; each has the weight rows / count.

    Args:
        rows: M.
        count: k, in [1, M].
        generator: Of the device.
        device: Where the indices lie.

    Returns:
        Indices, shape [k].

    Example:
        >>> sorted(choose_uniformly(3, 3).tolist())
        [0, 1, 2]
    """
    return torch.rand(rows, generator=generator, device=device).argsort()[:count]


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Round rows to int8 with one scale each, :math:`s_i = \max_j |H_{ij}| / 127`.

    Args:
        matrix: H, shape [M, N], floating.

    Returns:
        Integers, shape [M, N], int8, and scales, shape [M, 1], in float32 at least. The scale of a
        row that is not finite is not finite.

    Example:
        >>> quantise(torch.tensor([[127.0, -63.4]]))
        (tensor([[127, -63]], dtype=torch.int8), tensor([[1.]]))
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    scales = wide.abs().amax(dim=1, keepdim=True) / LARGEST
    by = torch.where(scales > 0, scales, 1.0)
    # A row that is not finite has no integers; its scale says so.
    integers = (wide / by).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-LARGEST, LARGEST)
    return integers.to(torch.int8), scales


def dequantise(integers: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    r"""Return :math:`q_{ij} s_i`; NaN throughout in a row whose scale is not finite.

    Args:
        integers: q, shape [M, N], int8.
        scales: s, shape [M, 1].
        dtype: Of what is returned.

    Returns:
        Shape [M, N].

    Example:
        >>> dequantise(*quantise(torch.tensor([[127.0, -63.4]])), dtype=torch.float32)
        tensor([[127., -63.]])
    """
    known = torch.where(scales.isfinite(), scales, torch.nan)
    return (integers * known).to(dtype)


def sampled_sum(shape: torch.Size, rows: Tensor, values: Tensor) -> Tensor:
    """Return a matrix of zeros with rows added in; a row that was chosen twice is added twice.

    Args:
        shape: [M, N].
        rows: Indices, shape [k].
        values: Shape [k, N].

    Example:
        >>> sampled_sum(torch.Size([2, 1]), torch.tensor([1, 1]), torch.tensor([[1.0], [2.0]]))
        tensor([[0.],
                [3.]])
    """
    return values.new_zeros(shape).index_add_(0, rows, values)
