"""Values that show whether a state of corrections belongs to an optimizer or to weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from regrad.sharding import local


class Mark(TypedDict):
    """Values by which an optimizer is recognised.

    Attributes:
        of_weights: Whether they are of the weights, because its state has no tensors.
        values: Sorted.
    """

    of_weights: bool
    values: list[float]


def mark_of(state: Mapping[Any, Any]) -> Mark | None:
    """Return the first values of the tensors of an optimizer's state; None if it has none."""
    tensors: list[Tensor] = []
    for of_parameter in state.values():
        if isinstance(of_parameter, Mapping):
            tensors += [value for value in of_parameter.values() if isinstance(value, Tensor)]
    if not tensors:
        return None
    return Mark(of_weights=False, values=_first_values(tensors))


def mark_of_weights(weights: Sequence[Tensor]) -> Mark:
    """Return the first values of weights, which tell an optimizer's state that has no tensor."""
    return Mark(of_weights=True, values=_first_values(weights))


def _first_values(tensors: Sequence[Tensor]) -> list[float]:
    """Return the first value of each tensor, sorted: names and order may change."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        part = local(tensor.detach())
        if _is_readable(part):
            first = part.flatten()[0].real.to(torch.float32)
            by_device.setdefault(first.device, []).append(first)
    values: list[float] = []
    for firsts in by_device.values():
        values += torch.stack(firsts).tolist()
    return sorted(0.0 if math.isnan(value) else value for value in values)


def _is_readable(part: Tensor) -> bool:
    """Say whether a tensor has a first value, which the quantised ones of libraries may not."""
    return type(part) is Tensor and part.layout is torch.strided and part.numel() > 0


def are_close(then: Sequence[float], now: Sequence[float]) -> bool:
    """Say whether values are equal but for the rounding to a parameter's type by loading."""
    if len(then) != len(now):
        return False
    pairs = zip(then, now, strict=True)
    return all(math.isclose(one, other, rel_tol=0.01, abs_tol=1e-7) for one, other in pairs)
