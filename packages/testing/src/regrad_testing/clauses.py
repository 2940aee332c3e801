"""A clause: one thing that must be true of every correction, and how its failure is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import pytest
import torch
from torch import Tensor

Test = TypeVar("Test", bound=Callable[..., Any])


def clause(name: str) -> Callable[[Test], Test]:
    """Mark a test of a suite as the one that proves the clause `name`."""

    def mark(test: Test) -> Test:
        test.clause = name  # type: ignore[attr-defined]
        return test

    return mark


def skip(reason: str) -> NoReturn:
    """Say that a clause does not apply, and why."""
    pytest.skip(reason)


def require(condition: object, message: str) -> None:
    """Fail the clause with `message` unless `condition` holds.

    Raises:
        AssertionError: If it does not.
    """
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


@contextmanager
def refused(kinds: type[Exception] | tuple[type[Exception], ...], message: str) -> Iterator[None]:
    """Fail the clause with `message` unless the block raises one of `kinds`."""
    __tracebackhide__ = True
    try:
        yield
    except kinds:
        return
    raise AssertionError(message)


def same_bits(one: object, other: object) -> bool:
    """Compare nested tensors and plain values bit for bit, NaN and signed zero included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(_bytes_of(one), _bytes_of(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bits, shape [bytes]."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest absolute difference between tensors of the same names, and its name.

    A value that is not finite on one side only counts as infinitely far.
    """
    worst = 0.0
    where = ""
    for name, value in one.items():
        if not same_bits(value, other[name]):
            both = value.isnan() & other[name].isnan()
            far = (value.double() - other[name].double()).abs().masked_fill(both, 0.0)
            here = far.nan_to_num(torch.inf).max().item() if far.numel() else 0.0
            if not where or here > worst:
                worst, where = here, name
    return worst, where


def require_same(
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    what: str,
    *,
    tolerance: float = 0.0,
    scale: float = 0.0,
) -> None:
    """Fail the clause unless tensors of the same names agree.

    Args:
        got: What was found.
        wanted: What it must be.
        what: Begins the message, such as "on sgd, four parts of a batch".
        tolerance: Largest absolute difference; 0 asks for the same bits.
        scale: Largest difference relative to the largest wanted value, which adds to `tolerance`.
    """
    __tracebackhide__ = True
    require(
        got.keys() == wanted.keys(),
        f"{what}: the parameters are {sorted(got)}, not {sorted(wanted)}",
    )
    worst, where = difference(got, wanted)
    bound = tolerance
    if scale and where:
        sizes = [w.double().abs().max().item() for w in wanted.values() if w.numel()]
        bound += scale * max(sizes, default=0.0)
    if bound == 0.0:
        require(
            not where, f"{what}: {where!r} differs by {worst:.1e}, and every bit must be the same"
        )
    require(worst <= bound, f"{what}: {where!r} differs by {worst:.1e}, more than {bound:.1e}")


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Fail the clause if a tensor holds NaN or infinity."""
    __tracebackhide__ = True
    for name, tensor in tensors.items():
        require(bool(torch.isfinite(tensor).all()), f"{what}: {name!r} is not finite")


def tensors_in(state: object, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested containers, each by its path."""
    if isinstance(state, Tensor):
        return {name: state}
    items: Any = ()
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= tensors_in(value, f"{name}.{key}".lstrip("."))
    return found
