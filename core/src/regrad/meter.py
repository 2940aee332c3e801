"""The effect meter: what each correction actually changed."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regrad.correction import Correction
from regrad.errors import RegradWarning
from regrad.hookspecs import LastStep, Step, hookimpl
from regrad.sharding import local

FIRST_STEPS = 20
EVERY = 50
PATIENCE = 200
MEASURES = ("share_touched", "relative_change", "cosine", "trigger_rate", "non_finite")
Named = dict[str, Tensor]


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Compare tensors pairwise without leaving the device.

    Args:
        before: n dense tensors, any of which may be empty.
        after: n tensors of the same shapes.

    Returns:
        Shape [n, 5], float64, which holds the squares of what float32 holds: largest absolute
        difference; norms of the difference, of before and of after; last, 1 where `after` is
        not finite.
    """
    old = [_at_least_float32(tensor) for tensor in before]
    new = [_at_least_float32(tensor) for tensor in after]
    difference = torch._foreach_sub(new, old)
    columns = [
        torch._foreach_norm([_with_an_element(tensor) for tensor in difference], torch.inf),
        *(torch._foreach_norm(tensors, 2, torch.float64) for tensors in (difference, old, new)),
    ]
    device = before[0].device
    stacked = [
        torch.stack([norm.to(device, torch.float64) for norm in column]) for column in columns
    ]
    is_infinite = ~stacked[3].isfinite()
    return torch.stack([*stacked, is_infinite.double()], dim=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, a complex one as pairs of real numbers."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return torch.view_as_real(wide.resolve_conj()) if wide.is_complex() else wide


def _with_an_element(tensor: Tensor) -> Tensor:
    """Return `tensor`, or one zero where it is empty: nothing has no largest element."""
    return tensor if tensor.numel() else tensor.new_zeros(1)


def change_and_cosine(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return relative change |b − a|/|a| and cosine of a and b.

    Args:
        rows: Shape [*, 5], as `compare` returns them.

    Returns:
        Two tensors of shape [*].
    """
    _, difference, before, after, _ = rows.unbind(dim=-1)
    squares = before.square() + after.square() - difference.square()
    product = before * after
    angle = torch.where(product > 0, squares / (2 * product), 0.0).clamp(-1, 1)
    # Relative to zero, any change is large.
    change = difference / torch.where(before > 0, before, 1e-19)
    return change, angle


def _summary(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `MEASURES` of one look, and which of them count, from rows of `compare`.

    Rows that are not finite say nothing about change and angle; how many looks met one is a
    separate measure.
    """
    is_finite = rows[:, :4].isfinite().all(dim=1)
    finite = torch.where(is_finite[:, None], rows, 0.0)
    change, angle = change_and_cosine(finite.square().sum(dim=0).sqrt())
    touched = (rows[:, 0] != 0).double()
    any_finite = is_finite.any().double()
    always = torch.ones_like(any_finite)
    measures = [touched.mean(), change, angle, touched.amax(), rows[:, 4].amax()]
    counts = [always, any_finite, any_finite, always, always]
    return torch.stack(measures) * torch.stack(counts), torch.stack(counts)


class Meter:
    """Observes every correction: the first steps, the first after its warm-up, then every 50th.

    Attributes:
        detail: Where to keep rows per tensor as well, or None: a list of
            (correction, stage, names, what `compare` returned).
        sums: Summed measures and how many looks each was summed over, by (correction, stage).
    """

    def __init__(self) -> None:
        self.detail: list[tuple[str, str, list[str], Tensor]] | None = None
        self.sums: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

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
        """Count one measurement of a correction in a stage, on the tensors that are in both."""
        names = [tensor for tensor in after if tensor in before]
        if not names:
            return
        rows = compare([before[tensor] for tensor in names], [after[tensor] for tensor in names])
        measures, counts = _summary(rows)
        total, looks = self.sums.get((name, stage), (measures * 0, counts * 0))
        self.sums[name, stage] = (total.to(measures) + measures, looks.to(counts) + counts)
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

    @hookimpl(wrapper=True)
    def correct_update(self, step: Step) -> Generator[None, Any, Any]:
        """Measure what the optimizer did before and after."""
        return (yield from self._around(step, "update", _displacements))

    def _around(
        self, step: Step, stage: str, read: Callable[[Step, Any], Named]
    ) -> Generator[None, Any, Any]:
        """Let the correction run; if a measurement is due, compare what `read` returns.

        It is called with None before, and afterwards with what the correction returned.
        """
        if not self.due(step.correction, step.index):
            return (yield)
        before = {name: tensor.clone() for name, tensor in read(step, None).items()}
        result = yield
        self.observe(step.correction.name, stage, before, read(step, result or ()))
        return result

    def effects(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return mean measures by correction and stage; without what was never finite.

        Waits for the device.
        """
        result: dict[str, dict[str, dict[str, float]]] = {}
        for (name, stage), (total, looks) in self.sums.items():
            means: dict[str, float] = {}
            sums = zip(MEASURES, total.tolist(), looks.tolist(), strict=True)
            for measure, value, count in sums:
                if count:
                    means[measure] = value / count
            result.setdefault(name, {})[stage] = means
        return result

    def load_sums(self, name: str, saved: Mapping[tuple[str, str], Any]) -> None:
        """Restore the `sums` of one correction from those of another meter."""
        for key, sums in saved.items():
            if key[0] == name:
                self.sums[key] = sums

    def warn_if_idle(self, correction: Correction, index: int) -> None:
        """Warn once, `PATIENCE` steps after the warm-up, if nothing was ever changed."""
        if index != correction.needs.warmup_steps + PATIENCE:
            return
        if correction.needs.stages == ("hidden",):
            return
        stages = self.effects().get(correction.name, {})
        if any(measures["trigger_rate"] for measures in stages.values()):
            return
        reason = correction.idle_reason()
        if reason is not None:
            warnings.warn(
                f"{correction.name!r} had no effect in {index} steps: {reason}",
                RegradWarning,
                stacklevel=2,
            )


def _weights(step: Step, moves: Sequence[Tensor | LastStep | None] | None) -> Named:
    """Return the weights, or, of those that are moved, where they are moved to."""
    if moves is None:
        return {name: local(parameter.detach()) for name, parameter in step.named_parameters()}
    places = zip(step.names, step.where_to(moves), strict=False)
    return {name: place for name, place in places if place is not None}


def _gradients(step: Step, _: object) -> Named:
    """Return the dense gradients."""
    return {name: local(grad) for name, grad in step.named_gradients() if not grad.is_sparse}


def _displacements(step: Step, _: object) -> Named:
    """Return what the optimizer's step did."""
    return {name: local(displacement) for name, displacement in step.named_displacements()}


def _moments(step: Step, _: object) -> Named:
    """Return the tensors of the optimizer's state that have their parameter's shape."""
    moments: Named = {}
    for name, parameter in step.named_parameters():
        for key, value in step.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[f"{name}: {key}"] = local(value)
    return moments
