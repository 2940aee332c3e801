"""Gradient quality: the gradients of single steps against the gradient of many samples at the same weights.

A diagnostic. It says whether a correction turns the single step towards the full gradient, which is neither
necessary nor sufficient for training better: no verdict reads it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

import numpy as np
import torch
from regrad.errors import refuse_if
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from regrad_runner.checkpoints.states import random_state, set_random_state
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import RunLog
from regrad_runner.settings.config import CompareConfig, RunConfig
from regrad_runner.training.run import TrainingRun

FILE, LINE = "gradient_quality.csv", "probe"
SEED = 3_141_592  # of the samples of the large batch and their augmentation: the same in every arm and at every probe
Gradient = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Quality:
    r"""One probe of one run, as `gradient_quality.csv` keeps it.

    With the large batch's gradient :math:`\bar g`, the cosine is
    :math:`\langle g, \bar g\rangle / (|g|\,|\bar g|)` and the norm ratio :math:`|g| / |\bar g|`, over all parameters
    as one vector.

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
        return {name: getattr(self, name) for name in MEASURES}


MEASURES = tuple(field.name for field in fields(Quality) if field.type == "float")
# What the numbers are called where curves are shown.
CURVES = {name: f"gradient quality/{name.replace('_', ' ')}" for name in MEASURES}


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
            f"probe_size must be at least {share} (the samples that all processes work through at once), "
            f"got {config.probe_size}"
        )


def _share(config: RunConfig, processes: int) -> int:
    """Return how many samples go through the model of one process at once."""
    return int(config.batch_size or 1) // config.accumulate // processes


class Probe:
    """Compares gradients of a run with those of a large batch, on a copy of the model: the run does not notice.

    The samples of the large batch are drawn once from the training set, augmented as in training but always in the
    same way, and worked through in parts of the size of a micro-batch, each normalised by its own statistics, as in
    training. Weights are the true ones before the step; random numbers are put back.

    Args:
        run: Before its first step. Its model is copied, and its optimizer gets a hook.
        every: Optimizer steps from probe to probe.
        size: Samples of the large batch, rounded down to whole micro-batches.

    Raises:
        RegradError: If the model is sharded.
    """

    def __init__(self, run: TrainingRun, *, every: int, size: int) -> None:
        refuse_if(
            run.attachment.engine.is_sharded(),
            "gradient quality works on a copy of the model; FSDP2 has none",
        )
        self._run, self._every = run, every
        self._twin = copy.deepcopy(run.attachment.model).train()
        self._samples = run.workload.train.with_seed(SEED)
        processes, rank = run.accelerator.num_processes, run.accelerator.process_index
        share = _share(run.config, processes)
        order = np.random.default_rng(SEED).permutation(len(self._samples))
        parts = min(size, len(order)) // (share * processes)
        mine = order[rank : parts * share * processes : processes]
        self._parts = [part.tolist() for part in np.split(mine, parts)]
        self._batches: list[tuple[Tensor, Tensor, Any]] = []
        self._corrected: Gradient = []
        run.on_micro_batch = self._see
        run.attachment.optimizer.register_step_pre_hook(self._keep)

    @property
    def _due(self) -> bool:
        return (self._run.position.step + 1) % self._every == 0

    def _see(self, inputs: Tensor, targets: Tensor) -> None:
        """Keep a micro-batch of a step that is probed, with the random numbers that its forward pass will draw."""
        if self._due:
            self._batches.append((inputs, targets, random_state()))

    @torch.no_grad()
    def _keep(self, optimizer: Any, *_: Any) -> None:
        """Copy gradients and weights just before the update: after every correction, which attached its hook before."""
        overflow, scale = (
            getattr(optimizer, "found_inf", None),
            getattr(optimizer, "grad_scale", None),
        )
        if not self._due or (overflow is not None and bool(overflow != 0)):
            return
        model = self._run.attachment.model
        for theirs, ours in (
            (model.parameters(), self._twin.parameters()),
            (model.buffers(), self._twin.buffers()),
        ):
            for live, kept in zip(theirs, ours, strict=True):
                kept.copy_(live)
        divisor = (
            1.0 if scale is None else scale
        )  # a fused optimizer divides by it itself, after this
        self._corrected = [None if p.grad is None else p.grad / divisor for p in model.parameters()]

    def finish_step(self) -> Quality | None:
        """Return what a probed step came to, after it; None for the others, and for a step that was skipped."""
        batches, corrected = self._batches, self._corrected
        self._batches, self._corrected = [], []
        if not corrected:
            return None
        run, before = self._run, random_state()
        try:
            raw = self._gradient(batches, len(batches))
            torch.manual_seed(SEED)
            large = self._gradient(self._large_batch(), len(self._parts))
        finally:
            set_random_state(before)
        own, theirs = _against(raw, large), _against(corrected, large)
        return Quality(
            arm=run.arm.name,
            seed=run.seed,
            step=run.position.step,
            cosine_raw=own[0],
            cosine_corrected=theirs[0],
            norm_ratio_raw=own[1],
            norm_ratio_corrected=theirs[1],
        )

    def _large_batch(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        device = self._run.accelerator.device
        for part in self._parts:
            inputs, targets = self._samples.__getitems__(part)
            yield inputs.to(device), targets.to(device), None

    def _gradient(self, batches: Iterable[tuple[Tensor, Tensor, Any]], count: int) -> Gradient:
        """Return the gradient of the plain loss, the mean over batches and processes, in the run's precision."""
        run, criterion = self._run, self._run.attachment.criterion
        plain: Any = getattr(criterion, "original", criterion)
        scaler = run.accelerator.scaler
        scale = (
            scaler.get_scale() if scaler is not None else 1.0
        )  # float16 loses small gradients without
        self._twin.zero_grad()
        for inputs, targets, drawn in batches:
            if drawn is not None:
                set_random_state(drawn)
            loss = plain(self._twin(run.as_inputs(inputs)), targets)
            (loss * (scale / count)).backward()
        gradients = [None if p.grad is None else p.grad / scale for p in self._twin.parameters()]
        return [None if g is None else run.accelerator.reduce(g, "mean") for g in gradients]


def _against(gradient: Gradient, large: Gradient) -> tuple[float, float]:
    """Return cosine and norm ratio of a gradient against the large batch's; NaN where one of them is zero."""
    norm, other = math.sqrt(_inner(gradient, gradient)), math.sqrt(_inner(large, large))
    ratio = norm / other if other else math.nan
    return (_inner(gradient, large) / (norm * other) if norm * other else math.nan), ratio


def _inner(one: Gradient, other: Gradient) -> float:
    """Return the inner product of two gradients; a missing tensor is zero."""
    pairs = [
        (a.float(), b.float()) if a.dtype.itemsize < 4 else (a, b) for a, b in _present(one, other)
    ]
    return math.fsum((a * b).sum().item() for a, b in pairs)


def _present(one: Gradient, other: Gradient) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]


def keep_quality(record: RunLog, row: Quality) -> None:
    """Add a probe to the points of a run."""
    record.log(LINE, row.step, row.measures)


def kept_qualities(folder: ResultsFolder) -> list[Quality]:
    """Return the probes of the runs that ended."""
    return folder.kept(LINE, Quality)


def mean_qualities(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """Return per arm, in the order of the rows, the number of probes and the means; None for what no probe could tell.

    Example:
        >>> numbers = {"cosine_raw": 0.5, "cosine_corrected": 0.6, "norm_ratio_raw": 2.0, "norm_ratio_corrected": 1.0}
        >>> mean_qualities([Quality(arm="agc", seed=0, step=10, **numbers)])[0]["cosine_corrected"]
        0.6
    """
    means: list[dict[str, Any]] = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [asdict(row) for row in rows if row.arm == arm]
        told = {name: [row[name] for row in own if math.isfinite(row[name])] for name in MEASURES}
        means.append(
            {
                "arm": arm,
                "probes": len(own),
                **{n: fmean(v) if v else None for n, v in told.items()},
            }
        )
    return means


def print_qualities(console: Console, rows: Sequence[Quality]) -> None:
    """Print the means per arm, where anything was probed."""
    if not rows:
        return
    title = "\ngradients against that of a large batch at the same weights: a diagnostic, no verdict reads it"
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for heading in (
        "arm",
        "probes",
        "cosine\nraw",
        "cosine\ncorrected",
        "norm ratio\nraw",
        "norm ratio\ncorrected",
    ):
        table.add_column(heading, overflow="fold")
    for mean in mean_qualities(rows):
        numbers = ("–" if mean[name] is None else f"{mean[name]:.3f}" for name in MEASURES)
        table.add_row(Text(mean["arm"]), str(mean["probes"]), *numbers)
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
