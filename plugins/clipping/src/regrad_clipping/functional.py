"""Clipping as functions of gradients and weights, exact on shards."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from regrad.exchange import is_on_host, scale_
from regrad.sharding import is_sharded, local, locals_of, row_norms, total_norm
from torch import Tensor


class Unit(NamedTuple):
    """What counts as one unit of a tensor.

    Attributes:
        axis: Dimension that counts the units; None makes the whole tensor one unit.
        groups: Into how many equal parts dimension 0 is divided first, each with its own units.
    """

    axis: int | None = 0
    groups: int = 1


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, got {value!r}")


@torch.no_grad()
def clip_adaptive_(
    grad: Tensor,
    weight: Tensor,
    *,
    max_ratio: float = 0.01,
    weight_floor: float = 1e-3,
    axis: int | None = 0,
) -> Tensor:
    r"""Shrink, in place, each unit of `grad` that is large against its weights.

    A unit is one index of dimension `axis`, or the whole tensor if it has fewer
    than two dimensions. For unit :math:`i` of the gradient G and the weight W,

    .. math:: G_i \leftarrow G_i \min(1, \lambda \max(\|W_i\|, \epsilon) / \|G_i\|).

    Args:
        grad: Gradient G, shape [O, *], plain or DTensor. Overwritten.
        weight: Parameter W that `grad` belongs to, same shape and device.
        max_ratio: :math:`\lambda`, the largest allowed gradient norm per unit of
            weight norm. Positive.
        weight_floor: :math:`\epsilon`, the smallest weight norm used, in the units
            of the weight. Positive, so that units starting at zero can move.
        axis: Dimension that counts the outputs; 1 for a transposed convolution.
            None makes the whole tensor one unit, as for a gain of shape [C, 1, 1].

    Returns:
        `grad` itself.

    Raises:
        ValueError: If the shapes differ, or `max_ratio` or `weight_floor` is not
            positive.

    Example:
        >>> grad, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> clip_adaptive_(grad, weight, max_ratio=0.5)
        tensor([[0.3000, 0.4000]])

    References:
        Brock, De, Smith and Simonyan, 2021, "High-Performance Large-Scale Image
        Recognition Without Normalization", section 4.
    """
    if grad.shape != weight.shape:
        raise ValueError(
            f"weight must have the shape of grad, {[*grad.shape]}, got {[*weight.shape]}"
        )
    check_positive("max_ratio", max_ratio)
    check_positive("weight_floor", weight_floor)
    units = [Unit(None if grad.dim() < 2 else axis)]
    clip_units_([grad], [weight], units, max_ratio=max_ratio, weight_floor=weight_floor)
    return grad


@torch.no_grad()
def unit_factors(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    units: Sequence[Unit],
    *,
    max_ratio: float,
    weight_floor: float,
) -> list[Tensor]:
    r"""Return what adaptive clipping multiplies each unit by, in (0, 1].

    Nothing of a gradient's size is allocated, and the arithmetic on the norms runs
    once for all tensors together.

    Args:
        grads: n gradients, plain or DTensor.
        weights: Their parameters, of the same shapes and devices.
        units: What a unit is in each.
        max_ratio: :math:`\lambda`, positive.
        weight_floor: :math:`\epsilon`, positive, in the units of the weights.

    Returns:
        n plain tensors in float32 at least, each broadcasting against the local
        part of its gradient. 1 for a gradient of zero; NaN if a norm is NaN.
    """
    gradient_norms = _norms(grads, units)
    weight_norms = _norms(weights, units)
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, norm in enumerate(gradient_norms):
        alike[norm.device, norm.dtype].append(index)
    factors: dict[int, Tensor] = {}
    for indices in alike.values():
        flat = _factors(
            torch.cat([weight_norms[i].flatten() for i in indices]),
            torch.cat([gradient_norms[i].flatten() for i in indices]),
            max_ratio=max_ratio,
            weight_floor=weight_floor,
        )
        sizes = [gradient_norms[i].numel() for i in indices]
        parts = flat.split(sizes)  # type: ignore[no-untyped-call]
        for i, part in zip(indices, parts, strict=True):
            factors[i] = _spread(part.view_as(gradient_norms[i]), grads[i], units[i])
    return [factors[i] for i in range(len(grads))]


@torch.no_grad()
def clip_units_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    units: Sequence[Unit],
    *,
    max_ratio: float,
    weight_floor: float,
) -> list[Tensor]:
    """Clip every gradient in place: `unit_factors` and `scale_units_` in one call.

    On a CPU each tensor with several units is scaled as soon as its norms are known, while its
    gradient is still in the cache.

    Args:
        grads: n gradients, plain or DTensor. Overwritten.
        weights: Their parameters, of the same shapes and devices.
        units: What a unit is in each.
        max_ratio: As for `unit_factors`.
        weight_floor: As for `unit_factors`.

    Returns:
        What `unit_factors` returns for them.

    Example:
        >>> grads, weights = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[1.0, 0.0]])]
        >>> clip_units_(grads, weights, [Unit()], max_ratio=0.5, weight_floor=1e-3)
        [tensor([[0.1000]])]
        >>> grads
        [tensor([[0.3000, 0.4000]])]
    """
    ways: dict[Any, list[int]] = defaultdict(list)
    for i, (grad, unit) in enumerate(zip(grads, units, strict=True)):
        if unit.groups > 1 or not grad.is_cpu or is_sharded(grad):
            ways[_clip_at_once_, None].append(i)
        elif unit.axis is None:
            ways[_clip_whole_, grad.dtype].append(i)
        elif grad.dim() > 1:
            ways[_clip_rows_, grad.dtype].append(i)
        else:
            ways[_clip_at_once_, None].append(i)
    factors: dict[int, Tensor] = {}
    for (clip, _), indices in ways.items():
        made = clip(
            [grads[i] for i in indices],
            [weights[i] for i in indices],
            [units[i] for i in indices],
            max_ratio=max_ratio,
            weight_floor=weight_floor,
        )
        factors.update(zip(indices, made, strict=True))
    return [factors[i] for i in range(len(grads))]


def _factors(
    weight_norms: Tensor, gradient_norms: Tensor, *, max_ratio: float, weight_floor: float
) -> Tensor:
    """Return the factors of units with these norms; those of the weights are overwritten."""
    return weight_norms.clamp_(min=weight_floor).mul_(max_ratio).div_(gradient_norms).clamp_(max=1)


def _clip_at_once_(
    grads: list[Tensor],
    weights: list[Tensor],
    units: list[Unit],
    *,
    max_ratio: float,
    weight_floor: float,
) -> list[Tensor]:
    """Clip tensors of any kind: all norms first, then all gradients."""
    factors = unit_factors(grads, weights, units, max_ratio=max_ratio, weight_floor=weight_floor)
    scale_units_(grads, factors)
    return factors


def _clip_whole_(
    grads: list[Tensor],
    weights: list[Tensor],
    _: list[Unit],
    *,
    max_ratio: float,
    weight_floor: float,
) -> list[Tensor]:
    """Clip tensors on the CPU that are one unit each, and whose norms have one dtype."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    factors = _factors(
        torch.stack(torch._foreach_norm(weights, 2, dtype)),
        torch.stack(torch._foreach_norm(grads, 2, dtype)),
        max_ratio=max_ratio,
        weight_floor=weight_floor,
    )
    # One by one: for bfloat16 `_foreach_mul_` rounds the factors first.
    for grad, factor in zip(grads, factors.tolist(), strict=True):
        if not factor >= 1:  # so that NaN spreads
            grad.mul_(factor)
    return list(factors.unbind())


def _clip_rows_(
    grads: list[Tensor],
    weights: list[Tensor],
    units: list[Unit],
    *,
    max_ratio: float,
    weight_floor: float,
) -> list[Tensor]:
    """Clip tensors of one dtype on the CPU that have several units each.

    What runs between two gradients finds its code out of the cache, so there are as few operations
    as possible: all weights come first.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    spans = [_span(grad, unit) for grad, unit in zip(grads, units, strict=True)]
    norm = torch.linalg.vector_norm
    factors = [
        norm(weight, 2, span, keepdim=True, dtype=dtype)
        for weight, span in zip(weights, spans, strict=True)
    ]
    torch._foreach_clamp_min_(factors, weight_floor)
    torch._foreach_mul_(factors, max_ratio)
    for grad, factor, span in zip(grads, factors, spans, strict=True):
        factor.div_(norm(grad, 2, span, keepdim=True, dtype=dtype)).clamp_(max=1)
        if _is_any_less_than_one(factor):
            grad.mul_(factor)
    return factors


def _span(tensor: Tensor, unit: Unit) -> list[int]:
    """Return the dimensions of a plain tensor that one of its units spans."""
    dims = list(range(tensor.dim()))
    if unit.axis is not None:
        del dims[unit.axis]
    return dims


def _is_any_less_than_one(factors: Tensor) -> bool:
    """Look, on the CPU, where reading a number is free and a pass over a gradient is not."""
    return factors.numel() > 0 and not factors.min().item() >= 1  # so that NaN spreads


@torch.no_grad()
def scale_units_(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each gradient by its factors, in place.

    Args:
        grads: n gradients, plain or DTensor. Overwritten.
        factors: What `unit_factors` returned for them.
    """
    elsewhere: list[Tensor] = []
    their_factors: list[Tensor] = []
    for grad, factor in zip(locals_of(grads), factors, strict=True):
        if grad.is_cpu:
            if _is_any_less_than_one(factor):
                grad.mul_(factor)
        else:
            elsewhere.append(grad)
            their_factors.append(factor)
    if elsewhere:  # all of them: reading the factors would wait for the device
        torch._foreach_mul_(elsewhere, their_factors)


def _norms(tensors: Sequence[Tensor], units: Sequence[Unit]) -> list[Tensor]:
    """Return the norms of each tensor's units; those of whole tensors are taken in one call."""
    norms: dict[int, Tensor] = {}
    whole: dict[Any, list[int]] = defaultdict(list)
    for i, (tensor, unit) in enumerate(zip(tensors, units, strict=True)):
        if unit.groups > 1:
            norms[i] = _grouped_norms(tensor, unit)
        elif unit.axis is None and not is_sharded(tensor):
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            whole[tensor.device, dtype].append(i)
        else:
            norms[i] = row_norms(tensor, unit.axis)
    for (_, dtype), indices in whole.items():
        found = torch._foreach_norm([tensors[i] for i in indices], 2, dtype)
        for i, norm in zip(indices, found, strict=True):
            norms[i] = norm.view([1] * tensors[i].dim())
    return [norms[i] for i in range(len(tensors))]


def _grouped_norms(tensor: Any, unit: Unit) -> Tensor:
    """Return the norms [groups, …] of units that dimension 0 holds several groups of."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    parts = whole.unflatten(0, (unit.groups, -1))
    dims = list(range(1, parts.dim()))
    if unit.axis is not None:
        dims.remove(unit.axis + 1)
    dtype = torch.promote_types(parts.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(parts, dim=dims, keepdim=True, dtype=dtype)
    return norms


def _spread(factor: Tensor, grad: Any, unit: Unit) -> Tensor:
    """Shape factors of grouped units so that they broadcast against the gradient's local part."""
    if unit.groups == 1:
        return factor
    size = grad.shape[0] // unit.groups
    spread = factor.expand(-1, size, *factor.shape[2:]).flatten(0, 1)
    if not is_sharded(grad):
        return spread
    # Imported here because it is heavy and only shards need it.
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    everywhere = [Replicate()] * grad.device_mesh.ndim
    whole = DTensor.from_local(
        spread.expand(grad.shape), grad.device_mesh, everywhere, run_check=False
    )
    return local(whole.redistribute(placements=grad.placements))


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together.

    If none is a shard it equals `torch.nn.utils.get_total_norm`, bit for bit.

    Args:
        grads: Any shapes, plain or DTensor. May be empty.

    Returns:
        A scalar on the device of the first gradient.
    """
    if any(map(is_sharded, grads)):
        return total_norm(grads)
    return torch.nn.utils.get_total_norm(grads)


@torch.no_grad()
def clip_norm_(grads: Sequence[Tensor], norm: Tensor, *, max_norm: float) -> None:
    r"""Scale all gradients, in place, so that their norm together is at most `max_norm`.

    .. math:: G \leftarrow G \min(1, c / (\|G\| + 10^{-6}))

    Args:
        grads: Gradients, plain or DTensor. Overwritten.
        norm: Their norm :math:`\|G\|`, a scalar.
        max_norm: c, positive.

    Example:
        >>> grads = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> clip_norm_(grads, gradient_norm(grads), max_norm=1.0)
        >>> grads
        [tensor([0.6000]), tensor([0.8000])]

    References:
        Pascanu, Mikolov and Bengio, 2013, "On the difficulty of training recurrent
        neural networks", algorithm 1; the 1e-6 is `torch.nn.utils.clip_grad_norm_`'s.
    """
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for part in locals_of(grads):
        by_device[part.device].append(part)
    for device, parts in by_device.items():
        torch._foreach_mul_(parts, coefficient.to(device))


@torch.no_grad()
def clip_update_(displacement: Tensor, rate: float | Tensor, *, max_rms: float = 1.0) -> Tensor:
    r"""Shrink, in place, what an optimizer's step adds to a tensor if it is large for its rate.

    With the step Δ of N elements and the rate :math:`\eta`,

    .. math:: \Delta \leftarrow \frac{\Delta}{\max(1, \operatorname{rms}(\Delta/\eta)/d)}, \qquad
        \operatorname{rms}(x) = \sqrt{\tfrac1N \sum_i x_i^2}.

    Args:
        displacement: Δ, shape [*], plain or DTensor. Overwritten.
        rate: :math:`\eta`, the learning rate of the step: a number, or a tensor of one element.
        max_rms: d, positive, in units of the rate.

    Returns:
        What it was multiplied by, in (0, 1] or NaN; a tensor of one element and the dimensions of
        the displacement.

    Raises:
        ValueError: If `max_rms` is not positive.

    Example:
        >>> step = torch.tensor([-0.3, 0.4])
        >>> factor = clip_update_(step, 0.1, max_rms=1.0)
        >>> step
        tensor([-0.0849,  0.1131])

    References:
        Shazeer and Stern, 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        section 6, where Δ/η is the update before the rate.
    """
    check_positive("max_rms", max_rms)
    (factor,) = clip_updates_([displacement], [rate], max_rms=max_rms)
    return factor.view([1] * displacement.dim())


@torch.no_grad()
def clip_updates_(
    displacements: Sequence[Tensor], rates: Sequence[float | Tensor], *, max_rms: float
) -> list[Tensor]:
    """Do the same to n steps.

    Args:
        displacements: n steps, plain or DTensor. Overwritten.
        rates: Of the steps.
        max_rms: Positive.

    Returns:
        n scalars that the steps were multiplied by.
    """
    units = [Unit(axis=None)] * len(displacements)
    norms = [norm.reshape(()) for norm in _norms(displacements, units)]
    factors: dict[int, Tensor] = {}
    for alike in _of_one_kind(norms):
        largest = [
            max_rms * math.sqrt(displacements[i].numel()) * _as_scalar(rates[i]) for i in alike
        ]
        norms_of = [norms[i] for i in alike]
        found = _factors_of_updates(norms_of, largest)
        factors.update(zip(alike, found, strict=True))
    _scale_each_(locals_of(displacements), [factors[i] for i in range(len(norms))])
    return [factors[i] for i in range(len(norms))]


def _of_one_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the tensors, together where device and dtype are equal."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(index)
    return list(alike.values())


def _as_scalar(rate: float | Tensor) -> float | Tensor:
    """Return a rate without dimensions."""
    return rate.detach().reshape(()) if isinstance(rate, Tensor) else rate


def _factors_of_updates(norms: list[Tensor], largest: list[float | Tensor]) -> list[Tensor]:
    """Return what steps with these norms are multiplied by, as scalars of one device and dtype."""
    # A step of zero, as with a rate of zero, stays zero.
    divisors = torch._foreach_clamp_min(norms, torch.finfo(norms[0].dtype).tiny)
    factors = torch._foreach_reciprocal(divisors)
    numbers = [bound for bound in largest if not isinstance(bound, Tensor)]
    if len(numbers) == len(largest):
        torch._foreach_mul_(factors, numbers)
    else:
        bounds = [torch.as_tensor(bound).to(norms[0]) for bound in largest]
        torch._foreach_mul_(factors, bounds)
    torch._foreach_clamp_max_(factors, 1)
    return list(factors)


def _scale_each_(parts: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its scalar, in place."""
    elsewhere: list[int] = []
    for index, (part, factor) in enumerate(zip(parts, factors, strict=True)):
        if not is_on_host(part):
            elsewhere.append(index)
        elif not factor >= 1:  # so that NaN spreads; reading it is free here
            part.mul_(factor)
    # All of them: reading the factors would wait for the device.
    scale_([parts[i] for i in elsewhere], [factors[i] for i in elsewhere])


@torch.no_grad()
def clip_value_(grads: Sequence[Tensor], *, max_value: float) -> None:
    r"""Clamp every element of the gradients to :math:`[-c, c]`, in place; NaN stays NaN.

    Args:
        grads: Gradients, plain or DTensor. Overwritten.
        max_value: c, positive, in the units of the gradient.

    Example:
        >>> grads = [torch.tensor([3.0, -0.5])]
        >>> clip_value_(grads, max_value=1.0)
        >>> grads
        [tensor([ 1.0000, -0.5000])]
    """
    on_device: list[Tensor] = []
    for part in locals_of(grads):
        if part.is_cpu:
            part.clamp_(-max_value, max_value)
        else:
            on_device.append(part)
    if on_device:
        torch._foreach_clamp_min_(on_device, -max_value)
        torch._foreach_clamp_max_(on_device, max_value)
