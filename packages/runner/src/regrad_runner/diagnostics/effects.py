"""The effect of corrections over training: what the effect meter saw between one evaluation and the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import RunLog
from regrad_runner.training.run import TrainingRun

FILE, LINE = "effects.csv", "effect"


@dataclass(frozen=True, kw_only=True)
class Effect:
    r"""What one correction did in one stage since the last evaluation, as `effects.csv` keeps it.

    Means over the steps that the meter looked at in between: the first 20, those after a warm-up, every 50th. With
    what the correction was given, a, and what it left, b, over all tensors as one vector, the relative change is
    :math:`|b - a| / |a|` and the cosine :math:`\langle a, b\rangle / (|a|\,|b|)`.

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


MEASURES = tuple(field.name for field in fields(Effect) if field.type == "float")


class EffectTrace:
    """Reads a run's effect meter piece by piece, without changing what the meter says of the whole run.

    Args:
        run: Before its first step.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._before: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def look(self) -> list[Effect]:
        """Return what was seen since the last look; nothing for a stage that was not looked at. Synchronises."""
        run, now = self._run, dict(self._run.attachment.engine.meter.sums)
        seen = []
        for (correction, stage), (total, count) in now.items():
            earlier, looks = self._before.get((correction, stage), (total * 0, count * 0))
            new_looks = count.to(earlier.device) - looks
            if new_looks.max() > 0:
                # A measure that was never finite in between is not a number.
                means = ((total - earlier) / new_looks).tolist()
                numbers: dict[str, Any] = dict(zip(MEASURES, means, strict=True))
                where: dict[str, Any] = {
                    "arm": run.arm.name,
                    "seed": run.seed,
                    "step": run.position.step,
                }
                seen.append(Effect(**where, correction=correction, stage=stage, **numbers))
        self._before = now
        return seen


def keep_effects(record: RunLog, rows: Sequence[Effect]) -> None:
    """Add what was seen at one evaluation to the points of a run."""
    for row in rows:
        numbers = {name: getattr(row, name) for name in MEASURES}
        labels = {"correction": row.correction, "stage": row.stage}
        record.log(LINE, row.step, numbers, labels)


def kept_effects(folder: ResultsFolder) -> list[Effect]:
    """Return the effects over training of the runs that ended."""
    return folder.kept(LINE, Effect)
