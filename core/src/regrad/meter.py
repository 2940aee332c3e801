"""The effect meter: what each correction really changed."""

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from regrad.correction import Correction
from regrad.errors import RegradWarning
from regrad.hookspecs import Step, hookimpl
from regrad.sharding import local

FIRST_STEPS, EVERY, PATIENCE = 20, 50, 200
MEASURES = ("share_touched", "relative_change", "cosine", "trigger_rate", "non_finite")
Named = dict[str, Tensor]


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Compare tensors pairwise without leaving the device.

    Args:
        before: n dense tensors, any of which may be without elements.
        after: n tensors of the same shapes.

    Returns:
        Shape [n, 5], float32: largest absolute difference; squared norms of the
        difference, of before and of after; last, 1 where `after` is not finite.
    """
    old, new = (
        [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        for tensors in (before, after)
    )
    difference = torch._foreach_sub(new, old)
    norms = [
        torch._foreach_norm([_with_an_element(t) for t in difference], torch.inf),
        *(torch._foreach_norm(t) for t in (difference, old, new)),
    ]
    largest, *rest = (
        torch.stack([n.to(before[0].device, torch.float32) for n in column]) for column in norms
    )
    return torch.stack([largest, *(r.square() for r in rest), (~rest[2].isfinite()).float()], dim=1)


def _with_an_element(tensor: Tensor) -> Tensor:
    """Return `tensor`, or one zero where it is empty: nothing has no largest element."""
    return tensor if tensor.numel() else tensor.new_zeros(1)


def change_and_cosine(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return relative change |b − a|/|a| and cosine of a and b from rows, shape [*, 5], of `compare`."""
    difference, before, after = rows[..., 1], rows[..., 2], rows[..., 3]
    product = (before.sqrt() * after.sqrt()).clamp_min(1e-38)
    angle = ((before + after - difference) / (2 * product)).clamp(-1, 1)
    return (difference / before.clamp_min(1e-38)).sqrt(), angle


class Meter:
    """Observes every correction: the first steps, the first after its warm-up, then every 50th.

    Attributes:
        detail: Where to keep rows per tensor as well, or None: a list of
            (correction, stage, names, what `compare` returned).
        sums: Summed measures and their number, by (correction, stage).
    """

    def __init__(self) -> None:
        self.detail: list[tuple[str, str, list[str], Tensor]] | None = None
        self.sums: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def due(self, correction: Correction, index: int) -> bool:
        """Say whether optimizer step `index` of `correction` is measured."""
        since = index - correction.needs.warmup_steps
        return (
            self.detail is not None
            or index < FIRST_STEPS
            or 0 <= since < FIRST_STEPS
            or index % EVERY == 0
        )

    @torch.no_grad()
    def observe(self, name: str, stage: str, before: Named, after: Named) -> None:
        """Count one measurement of the correction `name` in `stage`, on the tensors that are in both."""
        names = [n for n in after if n in before]
        if not names:
            return
        rows = compare([before[n] for n in names], [after[n] for n in names])
        touched = (rows[:, 0] != 0).float()
        change, angle = change_and_cosine(rows.sum(dim=0))
        seen = torch.stack([touched.mean(), change, angle, touched.amax(), rows[:, 4].amax()])
        total, count = self.sums.get((name, stage), (torch.zeros_like(seen), 0))
        self.sums[name, stage] = (total.to(seen.device) + seen, count + 1)
        if self.detail is not None:
            self.detail.append((name, stage, names, rows))

    @hookimpl(wrapper=True)
    def predict_weights(self, step: Step) -> Generator[None, Any, Any]:
        """Measure the weights against the predicted weights."""
        return (yield from self._around(step, "weights", _weights))

    @hookimpl(wrapper=True)
    def correct_gradients(self, step: Step) -> Generator[None, Any, Any]:
        """Measure gradients before and after."""
        return (yield from self._around(step, "gradient", _gradients))

    @hookimpl(wrapper=True)
    def correct_moments(self, step: Step) -> Generator[None, Any, Any]:
        """Measure the optimizer's state before and after."""
        return (yield from self._around(step, "moment", _moments))

    def _around(
        self, step: Step, stage: str, read: Callable[[Step, Any], Named]
    ) -> Generator[None, Any, Any]:
        due = self.due(step.correction, step.index)
        before = {name: tensor.clone() for name, tensor in read(step, None).items()} if due else {}
        result = yield
        self.observe(step.correction.name, stage, before, read(step, result or ()) if due else {})
        return result

    def effects(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return mean measures by correction and stage. Synchronises the device."""
        result: dict[str, dict[str, dict[str, float]]] = {}
        for (name, stage), (total, count) in self.sums.items():
            result.setdefault(name, {})[stage] = dict(
                zip(MEASURES, (total / count).tolist(), strict=True)
            )
        return result

    def warn_if_idle(self, correction: Correction, index: int) -> None:
        """Warn once, `PATIENCE` steps after the warm-up, if nothing was ever changed."""
        if index != correction.needs.warmup_steps + PATIENCE or correction.needs.stages == (
            "hidden",
        ):
            return
        seen = [stage["trigger_rate"] for stage in self.effects().get(correction.name, {}).values()]
        if not any(seen) and (reason := correction.idle_reason()) is not None:
            warnings.warn(
                f"{correction.name!r} had no effect in {index} steps: {reason}",
                RegradWarning,
                stacklevel=2,
            )


def _weights(step: Step, moves: Any) -> Named:
    weights = ((n, local(p.detach())) for n, p in zip(step.names, step.parameters, strict=True))
    if moves is None:
        return dict(weights)
    return {
        n: w + local(d) for (n, w), d in zip(weights, moves, strict=False) if d is not None
    }  # the window checks


def _gradients(step: Step, _: Any) -> Named:
    return {
        n: local(g)
        for n, g in zip(step.names, step.gradients, strict=True)
        if g is not None and not g.is_sparse
    }


def _moments(step: Step, _: Any) -> Named:
    states = (
        (n, p, step.optimizer.state.get(p, {}))
        for n, p in zip(step.names, step.parameters, strict=True)
    )
    pairs = ((f"{n}: {key}", value, p) for n, p, state in states for key, value in state.items())
    return {name: local(v) for name, v, p in pairs if getattr(v, "shape", ()) == p.shape != ()}
