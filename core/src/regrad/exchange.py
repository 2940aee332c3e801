"""Moves weights along their last step and back, with few passes over the memory and few launches.

On a CPU the operations run over pieces that stay in its cache; elsewhere each is one launch for
many tensors.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from regrad.errors import RegradWarning
from regrad.hookspecs import LastStep

# Elements of a piece on a CPU, and of the tensors that share a launch elsewhere.
PIECE = 2**18
GROUP = 2**23
# From this many elements, calling a compiled function costs less than it saves.
COMPILED_FROM = 2**15
# What torch raises if it finds no compiler, or one that fails.
NOT_COMPILED = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)

Tensors = Sequence[Tensor]


@torch.no_grad()
def extrapolate_(weights: Tensors, kept: Tensors, steps: Sequence[LastStep]) -> None:
    r"""Move weights along their last step, and keep their previous values.

    With factor r and decay :math:`\delta` of `steps`,

    .. math::
        \hat\theta = \theta + r(\theta - (1-\delta)\theta')
            = a(\theta + c(\theta - \theta')), \qquad
        a = 1 + r\delta, \quad c = r(1-\delta)/a.

    Args:
        weights: n plain tensors θ. Overwritten with :math:`\hat\theta`.
        kept: Their values θ' before the last step, with their shape, layout, dtype and device.
            Overwritten with θ.
        steps: How far to extrapolate, n of them.

    Example:
        >>> weights, before = [torch.tensor([3.0])], [torch.tensor([2.0])]
        >>> extrapolate_(weights, before, [LastStep(factor=0.5)])
        >>> weights, before
        ([tensor([3.5000])], [tensor([3.])])
    """
    on_host, elsewhere = _by_place(weights)
    scratch = _Scratch()
    for index in on_host:
        _extrapolate_on_host_(weights[index], kept[index], steps[index], scratch)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in elsewhere:
        groups[_kind(weights[index]), _identity(steps[index])].append(index)
    for alike in groups.values():
        size, length = _coefficients(steps[alike[0]])
        for group in _launches(alike, weights):
            live = [weights[index] for index in group]
            before = [kept[index] for index in group]
            _extrapolate_group_(live, before, size, length)


def _extrapolate_on_host_(weights: Tensor, kept: Tensor, step: LastStep, scratch: _Scratch) -> None:
    """Do the same to one tensor, in pieces that stay in the cache."""
    size, length = (float(number) for number in _coefficients(step))
    if step.is_compiled and _extrapolate_compiled_(weights, kept, size, length):
        return
    for live, before, spare in scratch.pieces(weights, kept):
        torch.lerp(before, live, 1 + length, out=spare)
        before.copy_(live)
        if size == 1:
            live.copy_(spare)
        else:
            torch.mul(spare, size, out=live)


def _extrapolate_compiled_(weights: Tensor, kept: Tensor, size: float, length: float) -> bool:
    """Do the same to a large tensor in one pass; say whether that was possible."""
    live, before = _rows(weights, kept)
    is_fit = live.dim() == 1 and live.dtype is torch.float32
    if not is_fit or live.numel() < COMPILED_FROM:
        return False
    in_one_pass = _compiled()
    if in_one_pass is None:
        return False
    # Numbers would be compiled in, and change with every step.
    in_one_pass(live, before, torch.tensor(length), torch.tensor(size))
    return True


def _in_one_pass(weights: Tensor, kept: Tensor, length: Tensor, size: Tensor) -> None:
    """Extrapolate, to be compiled."""
    ahead = (weights + (weights - kept) * length) * size
    kept.copy_(weights)
    weights.copy_(ahead)


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """Return `_in_one_pass` compiled; None, after a warning, if that does not work."""
    weights = torch.zeros(COMPILED_FROM)
    one = torch.ones(())
    try:
        # Whole graphs are not required: where torch gives up compiling again, it runs uncompiled.
        compiled: Callable[..., None] = torch.compile(_in_one_pass, dynamic=True)
        compiled(weights, weights.clone(), one, one)
    except NOT_COMPILED as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"the prediction continues uncompiled because torch.compile failed: {reason}",
            RegradWarning,
            stacklevel=2,
        )
        return None
    return compiled


def _extrapolate_group_(
    live: list[Tensor], before: list[Tensor], size: float | Tensor, length: float | Tensor
) -> None:
    """Do the same for tensors of one device and dtype with equal steps."""
    ahead = torch._foreach_sub(live, before)
    torch._foreach_mul_(ahead, length)
    torch._foreach_add_(ahead, live)
    if isinstance(size, Tensor) or size != 1:
        torch._foreach_mul_(ahead, size)
    torch._foreach_copy_(before, live)
    torch._foreach_copy_(live, list(ahead))


def _coefficients(step: LastStep) -> tuple[float | Tensor, float | Tensor]:
    """Return a and c of `extrapolate_`; tensors stay on their device."""
    size = 1 + step.factor * step.decay
    return size, step.factor * (1 - step.decay) / size


def _identity(step: LastStep) -> Hashable:
    """Return what equal steps share; of tensors, which are not read, the same ones."""
    parts = (step.factor, step.decay)
    return tuple(id(part) if isinstance(part, Tensor) else part for part in parts)


@torch.no_grad()
def swap_(weights: Tensors, kept: Tensors) -> None:
    """Exchange the values of n pairs of tensors of the same shape, layout, dtype and device.

    Example:
        >>> weights, kept = [torch.tensor([3.0])], [torch.tensor([2.0])]
        >>> swap_(weights, kept)
        >>> weights, kept
        ([tensor([2.])], [tensor([3.])])
    """
    on_host, elsewhere = _by_place(weights)
    scratch = _Scratch()
    for index in on_host:
        for live, other, spare in scratch.pieces(weights[index], kept[index]):
            spare.copy_(live)
            live.copy_(other)
            other.copy_(spare)
    for alike in _alike(elsewhere, weights):
        for group in _launches(alike, weights):
            _swap_group_([weights[index] for index in group], [kept[index] for index in group])


def _swap_group_(weights: list[Tensor], kept: list[Tensor]) -> None:
    """Do the same for tensors of one device and dtype."""
    spares = [torch.empty_like(tensor) for tensor in weights]
    torch._foreach_copy_(spares, weights)
    torch._foreach_copy_(weights, kept)
    torch._foreach_copy_(kept, spares)


@torch.no_grad()
def adopt_(kept: Tensors, weights: Tensors, flags: Tensors) -> None:
    """Overwrite each of `kept` with its weights where a flag is set, without reading the flag.

    Args:
        kept: n plain tensors. Overwritten.
        weights: Tensors like them.
        flags: n boolean scalars on the device.

    Example:
        >>> kept = [torch.zeros(2), torch.zeros(1)]
        >>> adopt_(kept, [torch.ones(2), torch.ones(1)], [torch.tensor(True), torch.tensor(False)])
        >>> kept
        [tensor([1., 1.]), tensor([0.])]
    """
    for alike in _alike(range(len(kept)), kept):
        for group in _launches(alike, kept):
            _adopt_group_(
                [kept[index] for index in group],
                [weights[index] for index in group],
                [flags[index] for index in group],
            )


def _adopt_group_(kept: list[Tensor], weights: list[Tensor], flags: list[Tensor]) -> None:
    """Do the same for tensors of one device and dtype, in few launches."""
    rows: list[Tensor] = []
    newer: list[Tensor] = []
    of_rows: list[Tensor] = []
    for own, live, flag in zip(kept, weights, flags, strict=True):
        row, live_row = _rows(own, live)
        if len(kept) == 1 or row.dim() != 1:
            torch.where(flag, live, own, out=own)
        else:
            rows.append(row)
            newer.append(live_row)
            of_rows.append(flag)
    if not rows:
        return
    lengths = tuple(row.numel() for row in rows)
    is_newer = torch.repeat_interleave(
        torch.stack(of_rows), _on_device(lengths, rows[0].device), output_size=sum(lengths)
    )
    chosen = torch.where(is_newer, torch.cat(newer), torch.cat(rows))
    torch._foreach_copy_(rows, list(torch.split(chosen, list(lengths))))


@functools.lru_cache(maxsize=256)
def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers on a device; copying them there in every step could wait for it."""
    return torch.tensor(lengths, device=device)


class _Scratch:
    """Memory for one piece of each dtype."""

    def __init__(self) -> None:
        self._rows: dict[torch.dtype, Tensor] = {}

    def pieces(self, weights: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over pieces of two tensors of one layout, with memory of the same length."""
        live, other = _rows(weights, kept)
        if live.dim() != 1:
            yield live, other, torch.empty_like(other)
            return
        total = live.numel()
        spare = self._rows.get(live.dtype)
        if spare is None or spare.numel() < min(total, PIECE):
            spare = live.new_empty(min(total, PIECE))
            self._rows[live.dtype] = spare
        if total <= PIECE:
            yield live, other, spare[:total]
            return
        pairs = zip(torch.split(live, PIECE), torch.split(other, PIECE), strict=True)
        for piece, its_other in pairs:
            yield piece, its_other, spare[: piece.numel()]


def _rows(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the memory of two tensors as rows, or, with gaps in it, the tensors."""
    one = one.detach()
    if one.is_contiguous() and other.is_contiguous():
        return one.view(-1), other.view(-1)
    order = sorted(range(one.dim()), key=one.stride, reverse=True)
    dense = one.permute(order)
    also_dense = other.permute(order)
    if dense.is_contiguous() and also_dense.is_contiguous():
        return dense.view(-1), also_dense.view(-1)
    return one, other


def _by_place(tensors: Tensors) -> tuple[list[int], list[int]]:
    """Return the numbers of the tensors on a CPU, and of the others."""
    on_host = [index for index, tensor in enumerate(tensors) if _is_on_host(tensor)]
    known = set(on_host)
    return on_host, [index for index in range(len(tensors)) if index not in known]


def _is_on_host(tensor: Tensor) -> bool:
    """Say whether a tensor lives on a CPU."""
    return tensor.device.type == "cpu"


def _kind(tensor: Tensor) -> Hashable:
    """Return what tensors in one launch share."""
    return tensor.device, tensor.dtype


def _alike(indexes: Sequence[int], tensors: Tensors) -> list[list[int]]:
    """Return numbers of tensors, together where device and dtype are the same."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in indexes:
        groups[_kind(tensors[index])].append(index)
    return list(groups.values())


def _launches(indexes: Sequence[int], tensors: Tensors) -> Iterator[list[int]]:
    """Iterate over numbers of tensors whose elements together are at most `GROUP`, or one alone."""
    group: list[int] = []
    elements = 0
    for index in indexes:
        count = tensors[index].numel()
        if group and elements + count > GROUP:
            yield group
            group = []
            elements = 0
        group.append(index)
        elements += count
    if group:
        yield group
