"""The effect meter: what each correction really changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from regrad.correction import Correction
from regrad.errors import RegradWarning
from regrad.hookspecs import hookimpl
from regrad.sharding import locals_of
from regrad.step import Step

FIRST_STEPS, EVERY, PATIENCE = 20, 50, 200
MEASURES = ("share_touched", "relative_change", "cosine", "trigger_rate", "non_finite")


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Compare tensors pairwise without leaving the device.

    Args:
        before: n dense tensors.
        after: n tensors of the same shapes.

    Returns:
        Shape [n, 5], float32: largest absolute difference; squared norms of the
        difference, of before and of after; last, 1 where `after` is not finite.
    """
    old, new = ([t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors] for tensors in (before, after))
    difference = torch._foreach_sub(new, old)
    norms = [torch._foreach_norm(difference, torch.inf), *map(torch._foreach_norm, (difference, old, new))]
    largest, *rest = (torch.stack([n.to(before[0].device, torch.float32) for n in column]) for column in norms)
    return torch.stack([largest, *(r.square() for r in rest), (~rest[2].isfinite()).float()], dim=1)


def cosine(squares: Tensor) -> Tensor:
    """Return cosines from the last dimension (…, |b − a|², |a|², |b|², …) of what `compare` returned."""
    difference, before, after = squares[..., 1], squares[..., 2], squares[..., 3]
    product = (before * after).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((before + after - difference) / (2 * product)).clamp(-1, 1)


class Meter:
    """Observes every correction: the first steps, the first after its warm-up, then every 50th.

    Attributes:
        detail: Where to keep per-tensor rows as well, or None: a list of
            (correction, stage, names, what `compare` returned).
    """

    def __init__(self) -> None:
        self.detail: list[tuple[str, str, list[str], Tensor]] | None = None
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def due(self, correction: Correction, index: int) -> bool:
        """Say whether optimizer step `index` of `correction` is measured."""
        since = index - correction.needs.warmup_steps
        return self.detail is not None or index < FIRST_STEPS or 0 <= since < FIRST_STEPS or index % EVERY == 0

    @torch.no_grad()
    def observe(
        self, name: str, stage: str, before: Sequence[Tensor], after: Sequence[Tensor], names: Sequence[str] = ()
    ) -> None:
        """Count one measurement of the correction `name` in `stage`."""
        if not before:
            return
        rows = compare(before, after)
        total = rows.sum(dim=0)
        touched = (rows[:, 0] != 0).float()
        change = (total[1] / total[2].clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        seen = torch.stack([touched.mean(), change, cosine(total), touched.amax(), rows[:, 4].amax()])
        key = (name, stage)
        self._sums[key] = seen + self._sums[key].to(seen.device) if key in self._sums else seen
        self._counts[key] = self._counts.get(key, 0) + 1
        if self.detail is not None:
            self.detail.append((name, stage, list(names), rows))

    @hookimpl(wrapper=True)
    def predict_weights(self, step: Step) -> Generator[None, Any, Any]:
        """Measure the displacement against the weights."""
        displacements = yield
        correction = step.correction
        if displacements and self.due(correction, step.index):
            moved = [
                (p, d, n) for p, d, n in zip(step.parameters, displacements, step.names, strict=True) if d is not None
            ]
            before = locals_of(p.detach() for p, _, _ in moved)
            after = [b + d for b, d in zip(before, locals_of(d for _, d, _ in moved), strict=True)]
            self.observe(correction.name, "weights", before, after, [n for *_, n in moved])
        return displacements

    @hookimpl(wrapper=True)
    def correct_gradients(self, step: Step) -> Generator[None, Any, Any]:
        """Measure gradients before and after."""
        return (yield from self._around(step, "gradient", _gradients))

    @hookimpl(wrapper=True)
    def correct_moments(self, step: Step) -> Generator[None, Any, Any]:
        """Measure the optimizer's state before and after."""
        return (yield from self._around(step, "moment", _moments))

    def _around(self, step: Step, stage: str, read: Callable[[Step], dict[str, Tensor]]) -> Generator[None, Any, Any]:
        correction = step.correction
        if not self.due(correction, step.index):
            return (yield)
        before = {name: tensor.clone() for name, tensor in read(step).items()}
        result = yield
        after = read(step)
        names = [n for n in before if n in after]
        self.observe(correction.name, stage, [before[n] for n in names], [after[n] for n in names], names)
        return result

    def effects(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return mean measures by correction and stage. Synchronises the device."""
        result: dict[str, dict[str, dict[str, float]]] = {}
        for (name, stage), sums in self._sums.items():
            means = (sums / self._counts[name, stage]).tolist()
            result.setdefault(name, {})[stage] = dict(zip(MEASURES, means, strict=True))
        return result

    def warn_if_idle(self, correction: Correction, index: int) -> None:
        """Warn once, `PATIENCE` steps after the warm-up, if nothing was ever changed."""
        if index != correction.needs.warmup_steps + PATIENCE:
            return
        seen = [stage["trigger_rate"] for stage in self.effects().get(correction.name, {}).values()]
        reason = correction.idle_reason()
        if seen and not any(seen) and reason is not None:
            warnings.warn(f"{correction.name!r} had no effect in {index} steps: {reason}", RegradWarning, stacklevel=2)


def _gradients(step: Step) -> dict[str, Tensor]:
    pairs = zip(step.names, step.gradients, strict=True)
    return {n: t for n, g in pairs if g is not None and not g.is_sparse for t in locals_of([g])}


def _moments(step: Step) -> dict[str, Tensor]:
    return {
        f"{name}: {key}": locals_of([value])[0]
        for name, parameter in zip(step.names, step.parameters, strict=True)
        for key, value in step.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    }
