"""Gradient quality: gradients of single steps against that of many samples at the same weights.

A diagnostic. It says whether a correction turns the single step towards the full gradient, which is
neither necessary nor sufficient for training better: no verdict reads it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import torch
from regrad.errors import RegradError
from torch import Tensor, nn

from regrad_runner.checkpoints.states import random_state, set_random_state
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import RunLog
from regrad_runner.settings.config import CompareConfig, RunConfig
from regrad_runner.training.run import TrainingRun

QUALITY_FILE = "gradient_quality.csv"
PROBE_LINE = "probe"
# Of the large batch's samples and their augmentation: the same in every arm and at every probe.
LARGE_BATCH_SEED = 3_141_592
Gradient = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Quality:
    r"""One probe of one run, as `gradient_quality.csv` keeps it.

    With the large batch's gradient :math:`\bar g`, the cosine is
    :math:`\langle g, \bar g\rangle / (|g|\,|\bar g|)` and the norm ratio
    :math:`|g| / |\bar g|`, over all parameters as one vector.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        step: Optimizer steps done, the one that was probed among them.
        cosine_raw: Of the mini-batch's gradient of the plain loss at the true weights.
        cosine_corrected: Of the gradient that the optimizer read.
        norm_ratio_raw: Of the first.
        norm_ratio_corrected: Of the second.
    """

    arm: str
    seed: int
    step: int
    cosine_raw: float
    cosine_corrected: float
    norm_ratio_raw: float
    norm_ratio_corrected: float

    @property
    def measures(self) -> dict[str, float]:
        """The four numbers by name."""
        return {name: getattr(self, name) for name in QUALITY_MEASURES}


QUALITY_MEASURES = tuple(field.name for field in fields(Quality) if field.type == "float")
# What the numbers are called where curves are shown.
PROBE_CURVES = {name: f"gradient quality/{name.replace('_', ' ')}" for name in QUALITY_MEASURES}


def check_probing(config: CompareConfig, *, processes: int, samples: int) -> None:
    """Raise a `ValueError` unless the large batch is at least one optimizer step's.

    Args:
        config: Resolved settings.
        processes: Number of processes.
        samples: Training samples.
    """
    share = _share(config, processes) * processes
    if config.probe_every is not None and min(config.probe_size, samples) < share:
        raise ValueError(
            f"probe_size must be at least {share} "
            f"(the samples that all processes work through at once), got {config.probe_size}"
        )


def _share(config: RunConfig, processes: int) -> int:
    """Return how many samples go through the model of one process at once."""
    return int(config.batch_size or 1) // config.accumulate // processes


class Probe:
    """Compares gradients of a run with those of a large batch.

    It works on a copy of the model: the run goes on as without it.

    The samples of the large batch are drawn once from the training set, augmented as in training
    but always in the same way, and worked through in parts of the size of a micro-batch, each
    normalised by its own statistics, as in training. Weights are the true ones before the step;
    the random state is restored.

    Args:
        run: Before its first step. Its model is copied, and its optimizer gets a hook.
        every: Optimizer steps from probe to probe.
        size: Samples of the large batch, rounded down to whole micro-batches.

    Raises:
        RegradError: If the model is sharded.
    """

    def __init__(self, run: TrainingRun, *, every: int, size: int) -> None:
        if run.attachment.engine.is_sharded():
            raise RegradError("gradient quality works on a copy of the model; FSDP2 has none")
        self._run = run
        self._every = every
        self._twin = copy.deepcopy(run.attachment.model).train()
        self._samples = run.workload.train.with_seed(LARGE_BATCH_SEED)
        self._parts = self._own_parts(size)
        self._batches: list[tuple[Tensor, Tensor, Any]] = []
        self._corrected: Gradient = []
        run.on_micro_batch = self._see
        run.attachment.optimizer.register_step_pre_hook(self._keep)

    def _own_parts(self, size: int) -> list[list[int]]:
        """Return which samples of the large batch this process works through, in micro-batches."""
        processes = self._run.accelerator.num_processes
        first = self._run.accelerator.process_index
        at_once = _share(self._run.config, processes) * processes
        order = np.random.default_rng(LARGE_BATCH_SEED).permutation(len(self._samples))
        count = min(size, len(order)) // at_once
        own = order[first : count * at_once : processes]
        return [part.tolist() for part in np.split(own, count)]

    @property
    def _due(self) -> bool:
        """Whether the step under way is probed."""
        return (self._run.position.step + 1) % self._every == 0

    def _see(self, inputs: Tensor, targets: Tensor) -> None:
        """Keep a micro-batch of a probed step, with the random state of its forward pass."""
        if self._due:
            self._batches.append((inputs, targets, random_state()))

    @torch.no_grad()
    def _keep(self, optimizer: Any, *_: Any) -> None:
        """Copy gradients and weights just before the update.

        Corrections have acted by then: they registered their hooks first.
        """
        overflow = getattr(optimizer, "found_inf", None)
        is_skipped = overflow is not None and bool(overflow != 0)
        if not self._due or is_skipped:
            return
        model = self._run.attachment.model
        live = chain(model.parameters(), model.buffers())
        kept = chain(self._twin.parameters(), self._twin.buffers())
        for source, copied in zip(live, kept, strict=True):
            copied.copy_(source)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it later
        self._corrected = _divided(model, 1.0 if scale is None else scale)

    def finish_step(self) -> Quality | None:
        """Return what a probed step came to, after it; None for a step that was not, or skipped."""
        batches = self._batches
        corrected = self._corrected
        self._batches = []
        self._corrected = []
        if not corrected:
            return None
        run = self._run
        before = random_state()
        try:
            raw = self._gradient(batches, len(batches))
            torch.manual_seed(LARGE_BATCH_SEED)
            large = self._gradient(self._large_batch(), len(self._parts))
        finally:
            set_random_state(before)
        cosine_raw, ratio_raw = _against(raw, large)
        cosine_corrected, ratio_corrected = _against(corrected, large)
        return Quality(
            arm=run.arm.name,
            seed=run.seed,
            step=run.position.step,
            cosine_raw=cosine_raw,
            cosine_corrected=cosine_corrected,
            norm_ratio_raw=ratio_raw,
            norm_ratio_corrected=ratio_corrected,
        )

    def _large_batch(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        """Yield this process's micro-batches of the large batch."""
        device = self._run.accelerator.device
        for part in self._parts:
            inputs, targets = self._samples.__getitems__(part)
            yield inputs.to(device), targets.to(device), None

    def _gradient(self, batches: Iterable[tuple[Tensor, Tensor, Any]], count: int) -> Gradient:
        """Return the plain loss's gradient at the copied weights, in the run's precision.

        It is the mean over batches and processes.

        Args:
            batches: Inputs, targets, and the random state of the forward pass, or None to go on.
            count: Number of batches.
        """
        run = self._run
        criterion = run.attachment.criterion
        plain: Any = getattr(criterion, "original", criterion)
        scaler = run.accelerator.scaler
        # Without a scale float16 loses small gradients.
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._twin.zero_grad()
        for inputs, targets, drawn in batches:
            if drawn is not None:
                set_random_state(drawn)
            loss = plain(self._twin(run.as_inputs(inputs)), targets)
            (loss * (scale / count)).backward()
        return [
            None if gradient is None else run.accelerator.reduce(gradient, "mean")
            for gradient in _divided(self._twin, scale)
        ]


def _divided(model: nn.Module, divisor: float | Tensor) -> Gradient:
    """Return the gradients of a model's parameters, divided."""
    return [
        None if parameter.grad is None else parameter.grad / divisor
        for parameter in model.parameters()
    ]


def _against(gradient: Gradient, large: Gradient) -> tuple[float, float]:
    """Return cosine and norm ratio of a gradient to the large batch's; NaN if a norm is zero."""
    norm = math.sqrt(_inner(gradient, gradient))
    large_norm = math.sqrt(_inner(large, large))
    if large_norm == 0:
        return math.nan, math.nan
    ratio = norm / large_norm
    if norm * large_norm == 0:
        return math.nan, ratio
    return _inner(gradient, large) / (norm * large_norm), ratio


def _inner(one: Gradient, other: Gradient) -> float:
    """Return the inner product of two gradients, where a missing tensor is zero."""
    products: list[float] = []
    for a, b in zip(one, other, strict=True):
        if a is not None and b is not None:
            products.append((_at_least_float32(a) * _at_least_float32(b)).sum().item())
    return math.fsum(products)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def keep_quality(record: RunLog, row: Quality) -> None:
    """Add a probe to the points of a run."""
    record.log(PROBE_LINE, row.step, row.measures)


def kept_qualities(folder: ResultsFolder) -> list[Quality]:
    """Return the probes of the runs that ended."""
    return folder.kept(PROBE_LINE, Quality)


def mean_qualities(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """Return the number of probes and the means per arm, in the order of the rows.

    A mean is None if no probe has a finite number.

    Example:
        >>> quality = Quality(
        ...     arm="agc",
        ...     seed=0,
        ...     step=10,
        ...     cosine_raw=0.5,
        ...     cosine_corrected=0.6,
        ...     norm_ratio_raw=2.0,
        ...     norm_ratio_corrected=1.0,
        ... )
        >>> mean_qualities([quality])[0]["cosine_corrected"]
        0.6
    """
    means: list[dict[str, Any]] = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        mean: dict[str, Any] = {"arm": arm, "probes": len(own)}
        for name in QUALITY_MEASURES:
            values = [value for row in own if math.isfinite(value := row.measures[name])]
            mean[name] = fmean(values) if values else None
        means.append(mean)
    return means
