"""What corrections would change on one batch of a workload, why, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import median
from typing import Any

import regrad
import torch
from regrad import RegradError
from regrad.correction import Correction
from regrad.order import resolve_order
from regrad.registry import create_all, origin
from torch import Tensor

from regrad_runner.diagnostics.memory import bytes_held
from regrad_runner.diagnostics.step_times import silence_meter
from regrad_runner.settings.arms import Arm, parts_of
from regrad_runner.settings.config import TrainConfig
from regrad_runner.settings.engine import refuse_deepspeed
from regrad_runner.training.preparation import load_data
from regrad_runner.training.run import TrainingRun

TIMED_STEPS = 10
UNTIMED_STEPS = 2  # before these: the first steps are slower
TensorRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one correction takes.

    Attributes:
        seconds: Host time in its hooks per step, without the effect meter.
        share_of_step: That time over the time of a plain step.
        state_bytes: Tensors that it holds from step to step.
        window_bytes: The kept copy of the weights that it moves.
    """

    seconds: float
    share_of_step: float
    state_bytes: int
    window_bytes: int


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One correction on one batch.

    Attributes:
        name: Its name.
        version: Distribution and version that it comes from.
        settings: It with its options, as Python writes it.
        stages: Where it acts.
        rows: One per stage and tensor that it could change: "stage", "tensor", "shape",
            "relative_change" (norm of the change over the norm before), "cosine" (before with
            after), "why".
        cost: What it takes; None if it was not measured.
        refuses: Installed corrections that it cannot work with, each with the reason.
        ordered: Installed corrections with which the order is declared, each with the declaration.
        notes: What it chose, and why it may have nothing to do.
    """

    name: str
    version: str
    settings: str
    stages: tuple[str, ...]
    rows: list[TensorRow]
    cost: Cost | None
    refuses: dict[str, str]
    ordered: dict[str, str]
    notes: list[str]

    @property
    def changed(self) -> list[TensorRow]:
        """The rows of the tensors that it changes."""
        return [row for row in self.rows if row["relative_change"]]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """An arm on one batch.

    Attributes:
        corrections: In acting order.
        plain_step_seconds: Median time of a step without them, on the same batch.
        step_seconds: Median time of a step with all of them, without the effect meter.
        notes: What concerns all of them.
    """

    corrections: list[Explained]
    plain_step_seconds: float
    step_seconds: float
    notes: list[str]


def explain(config: TrainConfig, *, after_steps: int = 1) -> Explanation:
    """Train some steps, then explain what each correction does on the next batch.

    That is what it changes, why, and at what cost.

    Args:
        config: Settings, the corrections among them.
        after_steps: Optimizer steps to train first: a correction that reads the optimizer's state
            needs one.

    Raises:
        ValueError: If anything is unknown, missing or does not fit, or the run has fewer steps.
        RegradError: If the corrections cannot work together, or not on this model and optimizer.
    """
    workload, config = load_data(config)
    refuse_deepspeed("regrad explain")
    parts = tuple(chain.from_iterable(parts_of(text) for text in config.corrections))
    arm = Arm("+".join(parts), parts)
    lr = config.lr or 0.0
    with closing(TrainingRun(config, workload, arm, seed=config.seed, lr=lr)) as run:
        if not 0 <= after_steps < run.total_steps:
            raise ValueError(
                f"after_steps must be from 0 to {run.total_steps - 1}, got {after_steps}"
            )
        for _ in islice(run.steps(), after_steps):
            pass
        effects, notes = effects_of(run)
        return _with_costs(run, effects, notes)


def effects_of(run: TrainingRun) -> tuple[list[Explained], list[str]]:
    """Return what each correction changes on the next batch, and notes on all of them.

    The run stays unchanged.

    Args:
        run: With corrections attached, before its last step.
    """
    told = run.attachment.explain(run.next_batch())
    explained: list[Explained] = []
    common_notes = list(told.notes)
    for correction in run.attachment.corrections:
        rows = [row for row in told.rows if row["correction"] == correction.name]
        notes = [note for note in told.notes if repr(correction.name) in note]
        explained.append(_explained(run, correction, rows, notes))
        common_notes = [note for note in common_notes if note not in notes]
    return explained, common_notes


def _explained(
    run: TrainingRun, correction: Correction, rows: Sequence[TensorRow], notes: Sequence[str]
) -> Explained:
    """Return one correction explained, its cost aside."""
    about = origin(correction)
    attached = [other.name for other in run.attachment.corrections]
    refuses, ordered = relations(correction, beside=attached)
    return Explained(
        name=correction.name,
        version=f"{about['distribution']} {about['version']}".rstrip(),
        settings=repr(correction),
        stages=correction.needs.stages,
        rows=list(_rows(run, correction, rows, notes)),
        cost=None,
        refuses=refuses,
        ordered=ordered,
        notes=[*notes, *_idle_notes(run, correction, rows)],
    )


def _idle_notes(
    run: TrainingRun, correction: Correction, rows: Sequence[TensorRow]
) -> Iterator[str]:
    """Yield why a correction that began may have changed nothing, if it can tell."""
    began = run.attachment.engine.applied >= correction.needs.warmup_steps
    if not began or not rows or any(row["relative_change"] for row in rows):
        return
    reason = correction.idle_reason()
    if reason:
        yield f"nothing may have changed because {reason}"


def _rows(
    run: TrainingRun,
    correction: Correction,
    rows: Sequence[TensorRow],
    notes: Sequence[str],
) -> Iterator[TensorRow]:
    """Yield the core's rows with shape and reason.

    If a stage changed something, those that changed nothing are left out.
    """
    parameters = dict(run.attachment.model.named_parameters())
    acting = {row["stage"] for row in rows if row["relative_change"]}
    for row in rows:
        if acting and row["stage"] not in acting:
            continue
        parameter = parameters.get(row["tensor"].partition(": ")[0])  # of a moment: "name: key"
        shape = None if parameter is None else list(parameter.shape)
        kept = {key: row[key] for key in ("stage", "tensor", "relative_change", "cosine")}
        yield kept | {"shape": shape, "why": _why(run, correction, row, parameter, notes)}


def _why(
    run: TrainingRun,
    correction: Correction,
    row: TensorRow,
    parameter: Tensor | None,
    notes: Sequence[str],
) -> str:
    """Say why a tensor is changed or is not."""
    if row["relative_change"]:
        return "changed"
    name = row["tensor"].partition(": ")[0]
    for note in notes:
        if name in note.replace(",", " ").split():
            return note
    if parameter is not None and not correction.selects(name, parameter):
        return "unchanged: not one of its tensors"
    warmup = correction.needs.warmup_steps
    if run.attachment.engine.applied < warmup:
        return f"unchanged: it begins after {warmup} steps"
    return "unchanged: nothing to correct at this step"


def relations(
    correction: Correction, *, beside: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Return which installed corrections a correction refuses, and with which it has an order.

    Args:
        correction: With its options.
        beside: Names that are not asked about: what is attached with it already.

    Returns:
        Reasons of refusals, and declarations, by the other's name. Plugins that cannot be loaded
        are left out.
    """
    refuses: dict[str, str] = {}
    ordered: dict[str, str] = {}
    for name in regrad.available():
        if name in beside:
            continue
        try:
            others = create_all([name])
        except (RegradError, ValueError, TypeError):
            continue  # it cannot be attached without options, so there is nothing to say about it
        if any(other.name == correction.name for other in others):
            refuses[name] = f"it contains {correction.name!r}"
            continue
        try:
            _, moves_as_first = resolve_order([correction, *others])
            _, moves_as_last = resolve_order([*others, correction])
        except RegradError as refusal:
            refuses[name] = str(refusal).partition(" cannot work together: ")[2] or str(refusal)
            continue
        moves = [*moves_as_first, *moves_as_last]
        declared = [move for move in moves if repr(correction.name) in move]
        if declared:
            ordered[name] = "; ".join(dict.fromkeys(declared))
    return refuses, ordered


def _with_costs(run: TrainingRun, explained: Sequence[Explained], notes: list[str]) -> Explanation:
    """Measure time and memory on the next batch: first with the corrections, then without them."""
    attachment = run.attachment
    engine = attachment.engine
    batch = run.next_batch()
    silence_meter(run)
    for _ in range(UNTIMED_STEPS):
        _timed_step(run, batch)
    before = dict(engine.seconds)
    corrected = _median_step(run, batch)
    after = dict(engine.seconds)
    held = {
        correction.name: bytes_held(correction, besides=attachment)
        for correction in attachment.corrections
    }
    window = bytes_held(engine.window, besides=attachment)
    run.close()
    for _ in range(UNTIMED_STEPS):
        _timed_step(run, batch)
    plain = _median_step(run, batch)
    with_costs: list[Explained] = []
    for one in explained:
        seconds = (after.get(one.name, 0.0) - before.get(one.name, 0.0)) / TIMED_STEPS
        cost = Cost(
            seconds=seconds,
            share_of_step=seconds / plain,
            state_bytes=held[one.name],
            window_bytes=window if "weights" in one.stages else 0,
        )
        with_costs.append(replace(one, cost=cost))
    return Explanation(
        corrections=with_costs, plain_step_seconds=plain, step_seconds=corrected, notes=notes
    )


def _median_step(run: TrainingRun, batch: tuple[Tensor, Tensor]) -> float:
    """Return the median time of some steps."""
    return median(_timed_step(run, batch) for _ in range(TIMED_STEPS))


def _timed_step(run: TrainingRun, batch: tuple[Tensor, Tensor]) -> float:
    """Train one step and return its time."""
    inputs, targets = batch
    started = time.perf_counter()
    run.accelerator.backward(run.attachment.criterion(run.model(inputs), targets))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
