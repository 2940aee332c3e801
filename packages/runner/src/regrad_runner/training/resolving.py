"""Settings completed with the workload's defaults."""

from __future__ import annotations

import torch

from regrad_runner.settings.checking import validated
from regrad_runner.settings.config import AUTO, CompareConfig, RunConfig, Trained, rounded_rate
from regrad_runner.training.optimizers import check_rate, spec_of
from regrad_runner.workloads.loading import settings_of_model
from regrad_runner.workloads.workload import Workload

# Below this many pixels per batch, one thread is as fast as two that wait for each other.
PIXELS_FOR_ONE_THREAD = 32_768


def resolved(config: Trained, workload: Workload) -> Trained:
    """Return a copy of settings in which nothing is left to the workload's defaults.

    Raises:
        ValueError: If a value does not fit the workload.
    """
    defaults = workload.defaults
    samples = len(workload.train)
    epochs = config.epochs or defaults.epochs
    model = config.model or defaults.model
    # A folder of a few images is a workload too.
    batch_size = config.batch_size or min(defaults.batch_size, samples)
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        total_steps = epochs * (samples // batch_size)
        warmup_steps = min(defaults.warmup_steps, total_steps // 10)
    of_model = settings_of_model(workload, model, {"width": config.width, "norm": config.norm})
    optimizer, suitable_lr = spec_of(config.optimizer, defaults)
    given = config.model_dump()
    lr = given["lr"]
    if lr is None:
        lr = suitable_lr
    if lr == AUTO:
        lr = rates_around(suitable_lr)
    rates = lr if isinstance(lr, tuple) else (lr,)
    for rate in rates:
        check_rate(optimizer, rate)
    if batch_size > samples:
        raise ValueError(
            f"batch_size must be at most {samples} (the training {workload.train.kind}), "
            f"got {batch_size}"
        )
    complete = {
        **given,
        **of_model,
        "epochs": epochs,
        "batch_size": batch_size,
        "model": model,
        "evaluations_per_epoch": config.evaluations_per_epoch or defaults.evaluations_per_epoch,
        "threads": config.threads or _threads(config, batch_size * workload.train.work),
        "warmup_steps": warmup_steps,
        "optimizer": optimizer,
        "lr": lr,
    }
    return validated(type(config), complete)


def rates_around(lr: float) -> tuple[float, float, float]:
    """Return a rate between a third of it and three times it, as `--lr auto` begins.

    Example:
        >>> rates_around(0.1)
        (0.0333, 0.1, 0.3)
    """
    return rounded_rate(lr / 3), lr, rounded_rate(lr * 3)


def _threads(config: RunConfig, pixels: int) -> int:
    """Return how many CPU threads suit batches of so many pixels.

    The runs of a comparison have one each on a CPU. As many take place at once as there are cores,
    and the last digits of a sum depend on its threads, so results would depend on the machine.
    """
    if pixels < PIXELS_FOR_ONE_THREAD:
        return 1
    if isinstance(config, CompareConfig) and not torch.accelerator.is_available():
        return 1
    return torch.get_num_threads()
