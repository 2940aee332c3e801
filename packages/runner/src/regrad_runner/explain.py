"""What corrections would change on one batch of a workload."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from regrad.explain import Explanation

from regrad_runner.arms import Arm, parts_of
from regrad_runner.config import TrainConfig
from regrad_runner.preparation import load_data
from regrad_runner.training import TrainingRun


def explain(config: TrainConfig, *, after_steps: int = 1) -> Explanation:
    """Train some steps, then say what each correction changes on the next batch.

    Args:
        config: Settings, the corrections among them.
        after_steps: Optimizer steps to train first: a correction that reads the optimizer's state needs one.

    Raises:
        ValueError: If anything is unknown, missing or does not fit, or the run has fewer steps.
        RegradError: If the corrections cannot work together, or not on this model and optimizer.
    """
    workload, config = load_data(config)
    parts = tuple(part for text in config.corrections for part in parts_of(text))
    with closing(
        TrainingRun(config, workload, Arm("+".join(parts), parts), seed=config.seed, lr=config.lr or 0.0)
    ) as run:
        if not 0 <= after_steps < run.total_steps:
            raise ValueError(f"after_steps must be from 0 to {run.total_steps - 1}, got {after_steps}")
        for _ in islice(run.steps(), after_steps):
            pass
        return run.attachment.explain(run.next_batch())
