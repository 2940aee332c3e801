"""What VeLO's networks see: 30 numbers per tensor, and 30 per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DECAYS = (0.9, 0.99, 0.999)  # of the momenta, and of the factored squares
SQUARE_DECAY = 0.999
CLIPPED = 0.1  # where one of the features clips the gradient
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)  # of the training
RANKS = 5


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the two longest axes, the longest last, or None with fewer than two axes.

    Among equal lengths the earlier axis counts as longer. The networks were trained on layers
    whose axes stand the other way round (inputs, outputs), where the later one did.

    Example:
        >>> factored_axes((64, 3, 7, 7)), factored_axes((5, 5)), factored_axes((9,))
        ((2, 0), (1, 0), None)
    """
    if len(shape) < 2:
        return None
    ordered = sorted(range(len(shape)), key=lambda axis: (shape[axis], -axis))
    return ordered[-2], ordered[-1]


def new_averages(weight: Tensor) -> dict[str, Tensor]:
    """Return the moving averages of a weight before its first step, in float32 at least.

    Args:
        weight: Any shape.

    Returns:
        `momenta` (shape of `weight`, 3), `square` (its shape), and the averages of squares over
        one axis, `rows` and `columns` (that axis 1, then 3), or `squares` (shape, 3) with fewer
        than two axes.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = list(weight.shape)
    spans = len(DECAYS)
    averages = {
        "momenta": torch.zeros([*shape, spans], dtype=wide, device=weight.device),
        "square": torch.zeros(shape, dtype=wide, device=weight.device),
    }
    axes = factored_axes(shape)
    if axes is None:
        averages["squares"] = torch.zeros([*shape, spans], dtype=wide, device=weight.device)
        return averages
    second, longest = axes
    for name, axis in (("rows", longest), ("columns", second)):
        reduced = [1 if place == axis else length for place, length in enumerate(shape)]
        averages[name] = torch.zeros([*reduced, spans], dtype=wide, device=weight.device)
    return averages


def update_averages_(averages: dict[str, Any], gradient: Tensor) -> None:
    """Let the moving averages of a weight take in a gradient, in place.

    Args:
        averages: From `new_averages`. Overwritten.
        gradient: Shape of the weight, in the averages' dtype.
    """
    decays = gradient.new_tensor(DECAYS)
    averages["momenta"].mul_(decays).add_(gradient.unsqueeze(-1) * (1 - decays))
    averages["square"].mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
    squares = (gradient * gradient + 1e-30).unsqueeze(-1)
    axes = factored_axes(gradient.shape)
    if axes is None:
        averages["squares"].mul_(decays).add_(squares * (1 - decays))
        return
    second, longest = axes
    rows = squares.mean(dim=longest, keepdim=True)
    columns = squares.mean(dim=second, keepdim=True)
    averages["rows"].mul_(decays).add_(rows * (1 - decays))
    averages["columns"].mul_(decays).add_(columns * (1 - decays))


def weight_features(weight: Tensor, gradient: Tensor, averages: dict[str, Any]) -> Tensor:
    """Return what the MLP sees of each weight.

    Args:
        weight: In the averages' dtype.
        gradient: Shape of `weight`.
        averages: After `update_averages_` with this gradient.

    Returns:
        (n, 30) for n weights; the mean square of each column is 1, or less where it is tiny.
    """
    momenta = averages["momenta"]
    square = averages["square"].unsqueeze(-1)
    inverse_root = (square + 1e-6).rsqrt()
    slope = gradient.unsqueeze(-1)
    factors, spread, factored_momenta = _factored(averages, weight.shape)
    columns = [
        slope,
        slope.clamp(-CLIPPED, CLIPPED),
        weight.unsqueeze(-1),
        momenta,
        square,
        momenta * inverse_root,
        inverse_root,
        slope * factors,
        slope * inverse_root,
        *spread,
        *[(average + 1e-8).rsqrt() for average in spread],
        factored_momenta,
    ]
    features = torch.cat(
        [column.expand(*weight.shape, -1).reshape(weight.numel(), -1) for column in columns], dim=1
    )
    return features.mul_((features.square().mean(dim=0) + 1e-5).rsqrt())


def _factored(
    averages: dict[str, Any], shape: torch.Size
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return the factors of the gradient, both averages of squares, and the factored momenta."""
    momenta = averages["momenta"]
    axes = factored_axes(shape)
    if axes is None:
        squares = averages["squares"]
        return _inverse_root(squares + 1e-9), (squares, squares), momenta * squares.pow(-0.5)
    rows = averages["rows"]
    columns = averages["columns"]
    relative = rows / (rows.mean(dim=axes[0], keepdim=True) + 1e-9)
    factors = _inverse_root(relative) * _inverse_root(columns)
    return factors, (rows, columns), momenta * factors


def tensor_features(
    weight: Tensor, averages: dict[str, Any], fraction: float, losses: Sequence[float]
) -> Tensor:
    """Return what the LSTM sees of a tensor.

    Args:
        weight: In the averages' dtype.
        averages: Before they take in this step's gradient.
        fraction: Of the training that is done; above 1 where it lasts longer than planned.
        losses: The 9 features of the losses.

    Returns:
        (30,).
    """
    norm = weight.square().mean().clamp(min=1e-9).rsqrt()
    momenta = (averages["momenta"] * norm).reshape(-1, len(DECAYS))
    square = (averages["square"] * norm).reshape(-1, 1)
    mean = momenta.mean(dim=0)
    rank = sum(length > 1 for length in weight.shape)
    return torch.cat(
        [
            torch.tanh((fraction - weight.new_tensor(FRACTIONS)) * 10),
            weight.new_tensor(losses),
            _log_size(square.mean(dim=0)),
            weight.new_tensor([float(rank == place) for place in range(RANKS)]),
            _log_size((momenta - mean).square().mean(dim=0)),
            # The mean of the momenta, not of the squares: the networks learnt it so.
            _log_size((square - mean).square().mean(dim=0)),
        ]
    )


def _log_size(values: Tensor) -> Tensor:
    """Return half the logarithm of ten times the size, which is clipped to [-5, 5] before."""
    return (1e-8 + (10 * values).abs()).log().clamp(-5, 5) * 0.5


def _inverse_root(values: Tensor) -> Tensor:
    """Return one over the root of what is at least 1e-9."""
    return values.clamp(min=1e-9).rsqrt()
