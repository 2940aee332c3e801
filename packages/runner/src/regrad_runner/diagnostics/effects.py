"""The effect of corrections over training, as the effect meter saw it between evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import RunLog
from regrad_runner.training.run import TrainingRun

EFFECTS_FILE = "effects.csv"
EFFECT_LINE = "effect"


@dataclass(frozen=True, kw_only=True)
class Effect:
    r"""What one correction did in one stage since the last evaluation, as `effects.csv` keeps it.

    The numbers are means over the steps that the meter looked at in between: the first 20, those
    after a warm-up, and every 50th. Let a be what the correction was given, and b what it left,
    each over all tensors as one vector. The relative change is :math:`|b - a| / |a|`, and the
    cosine is :math:`\langle a, b\rangle / (|a|\,|b|)`.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        step: Optimizer steps done at the evaluation.
        correction: Name of the correction.
        stage: Where it acted: criterion, weights, hidden, gradient or moment.
        share_touched: Share of the tensors that it changed, in [0, 1].
        relative_change: As above, at least 0.
        cosine: As above, in [-1, 1].
        trigger_rate: Share of the steps in which it changed anything, in [0, 1].
        non_finite: Share of the steps in which it left something that is not finite, in [0, 1].
    """

    arm: str
    seed: int
    step: int
    correction: str
    stage: str
    share_touched: float
    relative_change: float
    cosine: float
    trigger_rate: float
    non_finite: float


EFFECT_MEASURES = tuple(field.name for field in fields(Effect) if field.type == "float")


class EffectTrace:
    """Reads a run's effect meter piece by piece.

    What the meter says about the whole run stays unchanged.

    Args:
        run: Before its first step.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._before: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def look(self) -> list[Effect]:
        """Return what the meter saw since the last look, without the stages that it did not see.

        The device is waited for.
        """
        run = self._run
        sums = dict(run.attachment.engine.meter.sums)
        seen: list[Effect] = []
        for (correction, stage), (total, count) in sums.items():
            earlier_total, earlier_count = self._before.get(
                (correction, stage), (total * 0, count * 0)
            )
            looks = count.to(earlier_total.device) - earlier_count
            if looks.max() == 0:
                continue
            # A measure that was never finite in between is not a number.
            means = ((total - earlier_total) / looks).tolist()
            numbers: dict[str, Any] = dict(zip(EFFECT_MEASURES, means, strict=True))
            effect = Effect(
                arm=run.arm.name,
                seed=run.seed,
                step=run.position.step,
                correction=correction,
                stage=stage,
                **numbers,
            )
            seen.append(effect)
        self._before = sums
        return seen


def keep_effects(record: RunLog, rows: Sequence[Effect]) -> None:
    """Add what was seen at one evaluation to the points of a run."""
    for row in rows:
        numbers = {name: getattr(row, name) for name in EFFECT_MEASURES}
        labels = {"correction": row.correction, "stage": row.stage}
        record.log(EFFECT_LINE, row.step, numbers, labels)


def kept_effects(folder: ResultsFolder) -> list[Effect]:
    """Return the effects over training of the runs that ended."""
    return folder.kept(EFFECT_LINE, Effect)
