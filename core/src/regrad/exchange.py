"""Moves weights along their last step and back, with few passes over the memory and few launches.

Each operation takes pairs of tensors (x, y): x takes over what y holds, and y becomes what a rule
makes of both. On a CPU it runs over pieces that stay in its cache; elsewhere each operation of a
rule is one launch for many tensors.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from regrad.errors import RegradWarning
from regrad.hookspecs import LastStep

# Elements of a piece on a CPU, and of the tensors that share a launch elsewhere.
PIECE = 2**18
GROUP = 2**23
# Elements from which on a tensor on a CPU is moved alone, or by a compiled function: the call then
# costs less than it saves.
ALONE_FROM = 2**15
# What torch raises where it finds no compiler, or one that fails.
NOT_COMPILED = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)

Tensors = Sequence[Tensor]
Scalar = float | Tensor


class _Rule(Protocol):
    """What y of a pair (x, y) becomes."""

    @property
    def size(self) -> float:
        """What `write` leaves to be multiplied by, which costs nothing where it is copied."""

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Write it for one pair on a CPU."""

    def results(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        """Return it, in new memory, for pairs of one device and dtype."""


class _Extrapolation:
    """y goes on along its way from x: a(y + c(y − x)).

    Args:
        step: Says how far.
    """

    def __init__(self, step: LastStep) -> None:
        self._size = 1 + step.factor * step.decay
        self._length = step.factor * (1 - step.decay) / self._size

    @functools.cached_property
    def size(self) -> float:
        """The number a, read from its device."""
        return float(self._size)

    @functools.cached_property
    def length(self) -> float:
        """The number c, read from its device."""
        return float(self._length)

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        torch.lerp(x, y, 1 + self.length, out=out)

    def results(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        ahead = torch._foreach_sub(ys, xs)
        torch._foreach_mul_(ahead, self._length)
        torch._foreach_add_(ahead, ys)
        if isinstance(self._size, Tensor) or self._size != 1:
            torch._foreach_mul_(ahead, self._size)
        return list(ahead)


class _Exchange:
    """y becomes what x held."""

    size = 1.0

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def results(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        spares = [torch.empty_like(tensor) for tensor in xs]
        torch._foreach_copy_(spares, xs)
        return spares


class _Parting:
    """y becomes the way from it to x, without a decay: x − y + δy.

    Args:
        decay: δ.
    """

    size = 1.0

    def __init__(self, decay: Scalar) -> None:
        self._decay = decay

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        decay = float(self._decay)
        torch.sub(x, y, out=out)
        if decay != 0:
            out.add_(y, alpha=decay)

    def results(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        ways = torch._foreach_sub(xs, ys)
        if isinstance(self._decay, Tensor) or self._decay != 0:
            torch._foreach_add_(ways, torch._foreach_mul(ys, self._decay))
        return list(ways)


class _Joining:
    """y goes the way x, and decays: y + (x − δy).

    Args:
        decay: δ.
    """

    size = 1.0

    def __init__(self, decay: Scalar) -> None:
        self._decay = decay

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        decay = float(self._decay)
        if decay == 0:
            torch.add(x, y, out=out)
        else:
            torch.sub(x, y, alpha=decay, out=out)
            out.add_(y)

    def results(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        if not isinstance(self._decay, Tensor) and self._decay == 0:
            return list(torch._foreach_add(xs, ys))
        ends = torch._foreach_sub(xs, torch._foreach_mul(ys, self._decay))
        torch._foreach_add_(ends, ys)
        return list(ends)


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
    scratch = _Scratch()
    for alike in _alike([(_identity(s.factor), _identity(s.decay)) for s in steps]):
        step = steps[alike[0]]
        rule = _Extrapolation(step)
        left = alike
        if step.is_compiled:
            left = [i for i in alike if not _extrapolate_compiled_(weights[i], kept[i], rule)]
        _pass_on_(_chosen(kept, left), _chosen(weights, left), rule, scratch)


def _extrapolate_compiled_(weights: Tensor, kept: Tensor, rule: _Extrapolation) -> bool:
    """Do the same to a large tensor on a CPU in one pass; say whether that was possible."""
    if not _is_large_on_host(weights):
        return False
    live, before = as_rows(weights, kept)
    if live.dim() != 1 or live.dtype is not torch.float32:
        return False
    in_one_pass = _compiled()
    if in_one_pass is None:
        return False
    # Numbers would be compiled in, and change with every step.
    in_one_pass(live, before, torch.tensor(rule.length), torch.tensor(rule.size))
    return True


def _in_one_pass(weights: Tensor, kept: Tensor, length: Tensor, size: Tensor) -> None:
    """Extrapolate, to be compiled."""
    ahead = (weights + (weights - kept) * length) * size
    kept.copy_(weights)
    weights.copy_(ahead)


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """Return `_in_one_pass` compiled; None, after a warning, where that does not work."""
    weights = torch.zeros(ALONE_FROM)
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


@torch.no_grad()
def swap_(weights: Tensors, kept: Tensors) -> None:
    """Exchange the values of n pairs of tensors of the same shape, layout, dtype and device.

    Example:
        >>> weights, kept = [torch.tensor([3.0])], [torch.tensor([2.0])]
        >>> swap_(weights, kept)
        >>> weights, kept
        ([tensor([2.])], [tensor([3.])])
    """
    _pass_on_(kept, weights, _Exchange(), _Scratch())


@torch.no_grad()
def part_(weights: Tensors, kept: Tensors, decays: Sequence[Scalar]) -> None:
    r"""Go back to the weights before the last step, and keep what the step did.

    Args:
        weights: n plain tensors θ. Overwritten with θ'.
        kept: Their values θ' before the last step, with their shape, layout, dtype and device.
            Overwritten with :math:`\theta - (1-\delta)\theta'`.
        decays: :math:`\delta`, the share of the weights that the step took off besides, n of them.

    Example:
        >>> weights, before = [torch.tensor([3.0])], [torch.tensor([2.0])]
        >>> part_(weights, before, [0.0])
        >>> weights, before
        ([tensor([2.])], [tensor([1.])])
    """
    scratch = _Scratch()
    for alike in _alike([_identity(decay) for decay in decays]):
        rule = _Parting(decays[alike[0]])
        _pass_on_(_chosen(weights, alike), _chosen(kept, alike), rule, scratch)


@torch.no_grad()
def join_(
    weights: Tensors, kept: Tensors, decays: Sequence[Scalar], *, goes_back: bool = True
) -> None:
    r"""Undo `part_`, up to rounding, with the steps that `kept` holds now.

    Args:
        weights: n plain tensors θ'. Overwritten with :math:`(1-\delta)\theta' + \Delta`.
        kept: Steps :math:`\Delta`. Overwritten with θ'.
        decays: :math:`\delta`, n of them.
        goes_back: Whether θ' is needed; else `kept` stays as it is, at a pass over it less.

    Example:
        >>> weights, steps = [torch.tensor([2.0])], [torch.tensor([1.0])]
        >>> join_(weights, steps, [0.5])
        >>> weights, steps
        ([tensor([2.])], [tensor([2.])])
    """
    scratch = _Scratch()
    for alike in _alike([_identity(decay) for decay in decays]):
        rule = _Joining(decays[alike[0]])
        steps = _chosen(kept, alike)
        _pass_on_(steps, _chosen(weights, alike), rule, scratch, takes_over=goes_back)


def _pass_on_(
    xs: Tensors, ys: Tensors, rule: _Rule, scratch: _Scratch, *, takes_over: bool = True
) -> None:
    """Let each x take over what its y holds, and each y become what a rule makes of both.

    Args:
        xs: n plain tensors. Overwritten.
        ys: Tensors like them. Overwritten.
        rule: Called with the values of both.
        scratch: Memory for the pieces.
        takes_over: Whether x takes anything over; else it stays.
    """
    together: list[int] = []
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not _is_large_on_host(x):
            together.append(index)
            continue
        for piece, its_other, spare in scratch.pieces(x, y):
            rule.write(piece, its_other, spare)
            if takes_over:
                piece.copy_(its_other)
            if rule.size == 1:
                its_other.copy_(spare)
            else:
                torch.mul(spare, rule.size, out=its_other)
    for group in _launches(together, xs):
        first = _chosen(xs, group)
        second = _chosen(ys, group)
        results = rule.results(first, second)
        if takes_over:
            torch._foreach_copy_(first, second)
        torch._foreach_copy_(second, results)


@torch.no_grad()
def scale_(tensors: Tensors, factors: Tensors) -> None:
    """Multiply each tensor by a number of its own, which is not read from its device.

    Args:
        tensors: n plain tensors. Overwritten.
        factors: n scalars on their devices.

    Example:
        >>> tensors = [torch.ones(2), torch.ones(1)]
        >>> scale_(tensors, [torch.tensor(0.5), torch.tensor(3.0)])
        >>> tensors
        [tensor([0.5000, 0.5000]), tensor([3.])]
    """
    for group in _launches(range(len(tensors)), tensors):
        _scale_group_(_chosen(tensors, group), _chosen(factors, group))


def _scale_group_(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """Do the same for tensors of one device and dtype, in few launches."""
    rows: list[Tensor] = []
    of_rows: list[Tensor] = []
    for tensor, factor in zip(tensors, factors, strict=True):
        row, _ = as_rows(tensor, tensor)
        if len(tensors) == 1 or row.dim() != 1:
            tensor.mul_(factor)
        else:
            rows.append(row)
            of_rows.append(factor)
    if rows:
        # Factors that broadcast would be a launch each.
        lengths = [row.numel() for row in rows]
        torch._foreach_mul_(rows, list(torch.split(_spread(of_rows, rows), lengths)))


def _spread(numbers: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Return each number as often as its row has elements, in one row."""
    lengths = tuple(row.numel() for row in rows)
    return torch.repeat_interleave(
        torch.stack(numbers), _on_device(lengths, rows[0].device), output_size=sum(lengths)
    )


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
    for group in _launches(range(len(kept)), kept):
        _adopt_group_(_chosen(kept, group), _chosen(weights, group), _chosen(flags, group))


def _adopt_group_(kept: list[Tensor], weights: list[Tensor], flags: list[Tensor]) -> None:
    """Do the same for tensors of one device and dtype, in few launches."""
    rows: list[Tensor] = []
    newer: list[Tensor] = []
    of_rows: list[Tensor] = []
    for own, live, flag in zip(kept, weights, flags, strict=True):
        row, live_row = as_rows(own, live)
        if len(kept) == 1 or row.dim() != 1:
            torch.where(flag, live, own, out=own)
        else:
            rows.append(row)
            newer.append(live_row)
            of_rows.append(flag)
    if not rows:
        return
    lengths = [row.numel() for row in rows]
    is_newer = _spread(of_rows, rows)
    chosen = torch.where(is_newer, torch.cat(newer), torch.cat(rows))
    torch._foreach_copy_(rows, list(torch.split(chosen, lengths)))


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
        live, other = as_rows(weights, kept)
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


def as_rows(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the memory of two tensors as rows, or, with gaps in it, the tensors.

    Example:
        >>> as_rows(torch.zeros(2, 2), torch.ones(2, 2))
        (tensor([0., 0., 0., 0.]), tensor([1., 1., 1., 1.]))
    """
    one = one.detach()
    if one.is_contiguous() and other.is_contiguous():
        return one.view(-1), other.view(-1)
    order = sorted(range(one.dim()), key=one.stride, reverse=True)
    dense = one.permute(order)
    also_dense = other.permute(order)
    if dense.is_contiguous() and also_dense.is_contiguous():
        return dense.view(-1), also_dense.view(-1)
    return one, other


def is_on_host(tensor: Tensor) -> bool:
    """Say whether a tensor lives on a CPU.

    Example:
        >>> is_on_host(torch.zeros(1))
        True
    """
    return tensor.device.type == "cpu"


def _is_large_on_host(tensor: Tensor) -> bool:
    """Say whether a tensor lives on a CPU and is worth an operation of its own."""
    return tensor.numel() >= ALONE_FROM and is_on_host(tensor)


def _identity(number: Scalar) -> Hashable:
    """Return what equal numbers share; a tensor, which is not read, equals itself alone."""
    return id(number) if isinstance(number, Tensor) else number


def _chosen(tensors: Tensors, indexes: Sequence[int]) -> list[Tensor]:
    """Return some of the tensors, by their numbers."""
    return [tensors[index] for index in indexes]


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the numbers of the keys, together where they are equal."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return list(groups.values())


def _launches(indexes: Sequence[int], tensors: Tensors) -> Iterator[list[int]]:
    """Iterate over numbers of tensors of one device and dtype that share a launch.

    Their elements together are not many more than fit in a cache, or one tensor is alone.
    """
    kinds = [(tensors[index].device, tensors[index].dtype) for index in indexes]
    for alike in _alike(kinds):
        most = PIECE if is_on_host(tensors[indexes[alike[0]]]) else GROUP
        group: list[int] = []
        elements = 0
        for index in (indexes[place] for place in alike):
            count = tensors[index].numel()
            if group and elements + count > most:
                yield group
                group = []
                elements = 0
            group.append(index)
            elements += count
        if group:
            yield group
