"""PowerGrad as one function: the value of cross entropy, the gradient of a flattened softmax."""

from __future__ import annotations

import math
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from regrad.sharding import is_sharded
from torch import Size, Tensor
from torch.nn import functional as F

REDUCTIONS = ("none", "mean", "sum")

# Elements worked on at once. On a CPU a tile and its temporaries should stay in the cache, but
# many small parallel sections wait long for each other where other processes want the cores.
# 8 MiB in float32 is within a tenth of the fastest on a quiet machine and far from the slowest on
# a busy one. On other devices a tile only has to hide the launch of its kernels.
CPU_TILE = 2**21
DEVICE_TILE = 2**24

# Up to so many logits the number of operations counts more than how often memory is read.
FEW_LOGITS = 2**18
# On a CPU torch's softmax of shorter rows is slow: of 128 rows of 10 it took 23 microseconds, the
# same by exp, sum and division 5 (AMD EPYC, one thread, torch 2.15).
FEW_CLASSES = 32

Index = tuple[slice, ...]


class _Rule(NamedTuple):
    """Everything that is not a tensor."""

    alpha: float
    ignore_index: int
    reduction: str
    label_smoothing: float


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless `alpha` is in (0, 1]."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}; 1 is plain cross entropy")


def power_grad_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return plain cross entropy, whose gradient is that of a flattened softmax.

    With logits z, their softmax p and the target distribution q, the gradient of
    a row is, instead of c (p - q),

    .. math:: c\,(p' - q), \qquad
        p'_i = \frac{p_i^\alpha}{\sum_j p_j^\alpha} = \mathrm{softmax}(\alpha z)_i .

    For every combination of the arguments it is the gradient of
    `cross_entropy(alpha * logits, target, ...) / alpha`; class weights, soft and
    smoothed targets, where no single c exists, included. The value is
    `cross_entropy(logits, target, ...)`. So the gradient is not the derivative of
    the value: a finite-difference check must fail.

    Args:
        logits: z, shape [C], [N, C] or [N, C, d1, ...], floating point. Must not
            be changed in place before the backward pass. For a DTensor that is cut
            along its classes, run forward and backward inside
            `torch.distributed.tensor.parallel.loss_parallel()`.
        target: Class indices (int64 or uint8), shape [], [N] or [N, d1, ...], in
            [0, C) or `ignore_index`; or class probabilities q of the shape of
            `logits`. Has no gradient.
        alpha: :math:`\alpha`, the exponent, in (0, 1]; 1 delegates to
            `torch.nn.functional.cross_entropy`.
        weight: Weight of each class, shape [C], dtype of `logits`. Has no gradient.
        ignore_index: Class index whose rows do not count.
        reduction: "none", "mean" (over the weights of the rows that count; over
            all rows for class probabilities) or "sum".
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Returns:
        The loss in nats: shape [], or with "none" the shape of the class indices.

    Raises:
        ValueError: If `alpha`, `reduction` or `label_smoothing` is out of range,
            the shapes do not fit, or `target` or `weight` requires a gradient.
        TypeError: If the dtype of `target` does not fit its shape, or if `logits` is a
            DTensor cut along its classes and the arguments need all of them.
        RuntimeError: If it is differentiated twice.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> loss = power_grad_cross_entropy(logits, torch.tensor([0]), alpha=0.5)
        >>> loss
        tensor(0.1269, grad_fn=<_DirectBackward>)
        >>> loss.backward()
        >>> logits.grad  # softmax(z / 2) = [.7311, .2689] minus the target [1, 0]
        tensor([[-0.2689,  0.2689]])

    References:
        Das, Mondal, Lall, Joshi and Dutta Roy, 2021, "Altering Backward Pass
        Gradients improves Convergence" (arXiv 2111.12495), PowerGrad Transform. We
        differ: the published code hooks the logits and divides by the batch size,
        which is the formula only for one loss scale; this is invariant to loss
        scale, reduction and accumulation. Powers of p are never formed (a logit
        gap of 120 makes p zero in float32).
    """
    check_alpha(alpha)
    if alpha == 1:
        return F.cross_entropy(
            logits, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    _check_options(reduction, label_smoothing)
    _check_tensors(logits, target, weight)
    rule = _Rule(alpha, ignore_index, reduction, label_smoothing)
    if torch.compiler.is_compiling():
        return _by_operations(logits, target, weight, rule)
    if is_sharded(logits):
        return _on_mesh(logits, target, weight, rule)
    flat_logits, flat_target = _flatten(logits, target)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        value = _value(flat_logits, flat_target, weight, rule)
    elif _is_direct(flat_logits, flat_target, rule):
        value = _Direct.apply(flat_logits, flat_target, weight, rule)
    else:
        value = _PowerGrad.apply(flat_logits, flat_target, weight, rule)
    return value.reshape(_rows_shape(logits)) if reduction == "none" else value


def _check_options(reduction: str, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")


def _check_tensors(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Raise if `F.cross_entropy` would, or if a gradient would silently be missing."""
    if logits.dim() == 0:
        raise ValueError("logits must have shape [C], [N, C] or [N, C, d1, ...], got a scalar")
    _check_has_no_gradient("target", target)
    if weight is not None:
        _check_has_no_gradient("weight", weight)
    rows = _rows_shape(logits)
    if target.shape == logits.shape:
        if not target.is_floating_point():
            raise TypeError(
                "target must be floating point if it has the shape of logits, "
                f"got {target.dtype}; class indices have shape {list(rows)}"
            )
        return
    is_single = logits.dim() == 1 and target.numel() == 1
    if target.shape != rows and not is_single:
        raise ValueError(
            f"target must have shape {list(rows)} (class indices) or {list(logits.shape)} "
            f"(class probabilities), got {list(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"target must hold class indices as int64 or uint8, got {target.dtype}; "
            "pass target.long()"
        )


def _check_has_no_gradient(name: str, tensor: Tensor) -> None:
    """Raise if PowerGrad would silently leave out a gradient."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient: PowerGrad has none for it; pass {name}.detach()"
        )


def _rows_shape(logits: Tensor) -> Size:
    """Return the shape of `logits` without the classes."""
    return Size() if logits.dim() == 1 else logits.shape[:1] + logits.shape[2:]


def _flatten(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return `logits` as [N, C] or [N, C, S], `target` as [N], [N, S] or like the logits."""
    is_soft = target.shape == logits.shape
    if not is_soft:
        target = target.long()
    if logits.dim() == 1:
        target = target.unsqueeze(0) if is_soft else target.reshape(1)
        return logits.unsqueeze(0), target
    if logits.dim() == 2:
        return logits, target
    return logits.flatten(2), target.flatten(2 if is_soft else 1)


class _Tile(NamedTuple):
    """Whole rows that are worked on at once: as an index of the logits, and of the rows."""

    logits: Index
    rows: Index


def _tiles(logits: Tensor) -> list[_Tile]:
    """Cut [N, C] or [N, C, S] into tiles: of several items, or of places in one item."""
    budget = CPU_TILE if logits.device.type == "cpu" else DEVICE_TILE
    if logits.numel() <= budget:
        return [_Tile((), ())]
    batch, classes, *places = logits.shape
    items = budget // (classes * math.prod(places))
    if items or not places:
        return [_Tile((cut,), (cut,)) for cut in _cuts(batch, max(items, 1))]
    cuts = product(_cuts(batch, 1), _cuts(places[0], max(budget // classes, 1)))
    return [_Tile((item, slice(None), place), (item, place)) for item, place in cuts]


def _cuts(length: int, step: int) -> list[slice]:
    """Cut a dimension into slices of `step`."""
    return [slice(start, start + step) for start in range(0, length, step)]


def _plain(
    logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule, reduction: str
) -> Tensor:
    """Return plain cross entropy."""
    return F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=rule.ignore_index,
        reduction=reduction,
        label_smoothing=rule.label_smoothing,
    )


def _value(logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule) -> Tensor:
    """Return plain cross entropy, tile by tile; torch's own kernel gives every row."""
    tiles = _tiles(logits)
    if len(tiles) == 1:
        return _plain(logits, target, weight, rule, rule.reduction)
    is_soft = target.is_floating_point()
    parts = (
        _plain(logits[tile], target[tile if is_soft else rows], weight, rule, "none")
        for tile, rows in tiles
    )
    first = next(parts)
    # One tensor from the start: small ones kept between the tiles would leave the freed memory
    # in pieces.
    losses = first.new_empty(_rows_shape(logits))
    for (_, rows), part in zip(tiles, chain([first], parts), strict=True):
        losses[rows] = part
    if rule.reduction == "none":
        return losses
    total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    if rule.reduction == "mean":
        keep = None if is_soft else target != rule.ignore_index
        total = total / _rows_that_count(logits, target, weight, keep)
    return total.to(losses.dtype)


def _rows_that_count(
    logits: Tensor, target: Tensor, weight: Tensor | None, keep: Tensor | None
) -> Tensor | int:
    """Return what "mean" divides by: the number of rows, or the weights of the rows to `keep`."""
    if keep is None:
        return math.prod(_rows_shape(logits))
    if weight is None:
        return keep.sum()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weights = wide[torch.where(keep, target, 0)]
    return torch.where(keep, weights, 0).sum()


def _is_direct(logits: Tensor, target: Tensor, rule: _Rule) -> bool:
    """Say whether `_Direct` takes these: few logits [N, C] in full precision, plain classes."""
    return (
        logits.dim() == 2
        and 0 < logits.numel() <= min(FEW_LOGITS, CPU_TILE)
        and logits.dtype in (torch.float32, torch.float64)
        and not rule.label_smoothing
        and target.dim() == 1
    )


class _Direct(torch.autograd.Function):
    """Loss and gradient in as few operations as possible: on few logits each costs as much as exp.

    The log-probabilities are kept, as torch's own loss keeps them, instead of being recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule
    ) -> Tensor:
        log_probabilities = torch.log_softmax(logits, 1)
        # What `F.cross_entropy` calls; it does not hand out the weight that the mean divides by.
        value, total_weight = torch.ops.aten.nll_loss_forward(
            log_probabilities, target, weight, REDUCTIONS.index(rule.reduction), rule.ignore_index
        )
        ctx.save_for_backward(logits, target, weight, log_probabilities, total_weight)
        ctx.rule = rule
        return value  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        if not torch.is_grad_enabled():
            gradient = _direct_gradient(upstream, *ctx.saved_tensors[1:], rule=ctx.rule)
            return gradient, None, None, None
        logits, *rest = ctx.saved_tensors
        with torch.no_grad():
            gradient = _direct_gradient(upstream, *rest, rule=ctx.rule)
        return _NotTwice.apply(gradient, logits, upstream), None, None, None


def _direct_gradient(
    upstream: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_probabilities: Tensor,
    total_weight: Tensor,
    *,
    rule: _Rule,
) -> Tensor:
    """Return the gradient [N, C] of the logits, for class indices without smoothing."""
    # -c at the target of each row that counts, else 0.
    gradient: Tensor = torch.ops.aten.nll_loss_backward(
        upstream,
        log_probabilities,
        target,
        weight,
        REDUCTIONS.index(rule.reduction),
        rule.ignore_index,
        total_weight,
    )
    scale = gradient.sum(1, keepdim=True)
    return gradient.addcmul_(_flattened(log_probabilities, rule.alpha), scale, value=-1)


def _flattened(log_probabilities: Tensor, alpha: float) -> Tensor:
    """Return p' of log p, both [N, C]."""
    powers = log_probabilities * alpha
    if powers.is_cpu and powers.shape[1] < FEW_CLASSES:
        powers.exp_()  # none of a row vanishes that matters: its largest is at least C^-alpha
        return powers.div_(powers.sum(1, keepdim=True))
    return torch.softmax(powers, 1)


class _PowerGrad(torch.autograd.Function):
    """Keep only the logits; the gradient is made in the backward pass, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight)
        ctx.rule = rule
        return _value(logits, target, weight, rule)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, weight = ctx.saved_tensors
        with torch.no_grad():
            gradient = _gradient(logits, target, weight, ctx.rule, upstream)
        if torch.is_grad_enabled():
            gradient = _NotTwice.apply(gradient, logits, upstream)
        return gradient, None, None, None


class _NotTwice(torch.autograd.Function):
    """Refuse to differentiate a gradient; `once_differentiable` would take it for a constant."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, _logits: Tensor, _upstream: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, _upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "power_grad_cross_entropy must be differentiated only once, but its gradient was "
            "differentiated again; use alpha=1 or F.cross_entropy for second derivatives"
        )


def _gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule, upstream: Tensor
) -> Tensor:
    """Return the gradient of the logits for the gradient `upstream` of the reduced loss."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight = None if weight is None else weight.to(dtype)
    keep = None if target.is_floating_point() else target != rule.ignore_index
    scale = upstream.to(dtype)
    if rule.reduction == "mean":
        scale = scale / _rows_that_count(logits, target, weight, keep)
    if keep is None:
        scale = scale.expand(_rows_shape(logits))
    else:
        # Not multiplied: if all rows are ignored the mean divides by zero, torch's gradient is 0.
        scale = torch.where(keep, scale, 0)
        target = torch.where(keep, target, 0)
    tiles = _tiles(logits)
    if len(tiles) == 1:
        return _residual(logits, target, weight, rule).mul_(scale.unsqueeze(1)).to(logits.dtype)
    gradient = torch.empty_like(logits)
    for tile, rows in tiles:
        residual = _residual(logits[tile], target[tile if keep is None else rows], weight, rule)
        torch.mul(residual, scale[rows].unsqueeze(1), out=gradient[tile])
    return gradient


def _residual(logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule) -> Tensor:
    """Return |d| p' - d per row, with d the smoothed and weighted target."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    residual = torch.softmax(logits.to(dtype) * rule.alpha, 1)
    if target.is_floating_point():
        _subtract_probabilities(residual, target, weight, rule.label_smoothing)
    else:
        _subtract_classes(residual, target, weight, rule.label_smoothing)
    return residual


def _subtract_classes(
    residual: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> None:
    """Turn p' into |d| p' - d, in place, for class indices."""
    index = target.unsqueeze(1)
    if weight is None:
        own = torch.full_like(index, smoothing - 1, dtype=residual.dtype)
    else:
        own = weight[index] * (smoothing - 1)
        residual.mul_(weight.mean() * smoothing - own)
    if smoothing:
        residual.sub_(_per_class(weight, residual) * (smoothing / residual.shape[1]))
    residual.scatter_add_(1, index, own)


def _subtract_probabilities(
    residual: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> None:
    """Turn p' into |d| p' - d, in place, for class probabilities."""
    wanted = target.to(residual.dtype)
    if smoothing:
        wanted = wanted * (1 - smoothing) + smoothing / residual.shape[1]
    if weight is not None:
        wanted = wanted * _per_class(weight, residual)
    residual.mul_(wanted.sum(1, keepdim=True)).sub_(wanted)


def _per_class(weight: Tensor | None, like: Tensor) -> Tensor | float:
    """Return `weight` so that it broadcasts along dimension 1 of `like`; 1 without weights."""
    return 1.0 if weight is None else weight.view(-1, *[1] * (like.dim() - 2))


class _GradientOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.to(ctx.dtype), None


def _on_mesh(logits: Any, target: Tensor, weight: Tensor | None, rule: _Rule) -> Tensor:
    """Return the loss of a DTensor, whose classes torch's `loss_parallel` may leave in parts."""
    class_dim = 0 if logits.dim() == 1 else 1
    in_parts = any(getattr(p, "dim", None) == class_dim for p in logits.placements)
    if in_parts and (target.is_floating_point() or rule.label_smoothing):
        # Under loss_parallel torch's own gradient of class probabilities is silently wrong.
        raise TypeError(
            "logits must hold all classes when targets are class probabilities or smoothed, got "
            f"placements {logits.placements}; pass logits.full_tensor(), or class indices"
        )
    try:
        return _by_operations(logits, target, weight, rule)
    except RuntimeError as error:
        raise TypeError(
            "logits must be a tensor, or a DTensor on which torch's own cross entropy takes these "
            f"arguments, got placements {logits.placements}; put loss and backward into "
            "torch.distributed.tensor.parallel.loss_parallel(), or pass logits.full_tensor() "
            f"(torch says: {error})"
        ) from error


def _by_operations(logits: Tensor, target: Tensor, weight: Tensor | None, rule: _Rule) -> Tensor:
    """Return the loss in whole operations, for compilers, which would unroll tiles, and meshes."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide_weight = None if weight is None else weight.to(wide.dtype)
    surrogate = _plain(wide * rule.alpha, target, wide_weight, rule, rule.reduction) / rule.alpha
    plain = _plain(logits.detach(), target, weight, rule, rule.reduction)
    value: Tensor = _GradientOf.apply(surrogate, plain)
    return value
