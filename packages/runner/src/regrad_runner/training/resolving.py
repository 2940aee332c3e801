"""Settings completed by what suits the workload."""

from __future__ import annotations

import torch

from regrad_runner.settings.checking import validated
from regrad_runner.settings.config import Config
from regrad_runner.training.optimizers import check_rate, spec_of
from regrad_runner.workloads.loading import settings_of_model
from regrad_runner.workloads.workload import Workload

# Below this many pixels per batch, one thread is as fast as two that wait for each other.
PIXELS_FOR_ONE_THREAD = 32_768


def resolved(config: Config, workload: Workload) -> Config:
    """Return a copy of settings in which nothing is left to the workload's defaults.

    Raises:
        ValueError: If a value does not fit the workload.
    """
    defaults = workload.defaults
    names = ("epochs", "batch_size", "model", "evaluations_per_epoch")
    values = {name: getattr(config, name) or getattr(defaults, name) for name in names}
    if config.batch_size is None:  # a folder of a few images is a workload too
        values["batch_size"] = min(values["batch_size"], len(workload.train))
    values |= settings_of_model(
        workload, values["model"], {"width": config.width, "norm": config.norm}
    )
    values["threads"] = config.threads or _threads(values["batch_size"] * workload.train.work)
    steps = values["epochs"] * (len(workload.train) // values["batch_size"])
    usual = min(defaults.warmup_steps, steps // 10)
    values["warmup_steps"] = usual if config.warmup_steps is None else config.warmup_steps
    values["optimizer"], lr = spec_of(config.optimizer, defaults)
    given = config.model_dump()
    values["lr"] = lr if given["lr"] is None else given["lr"]
    for rate in values["lr"] if isinstance(values["lr"], tuple) else (values["lr"],):
        check_rate(values["optimizer"], rate)
    if values["batch_size"] > len(workload.train):
        raise ValueError(
            f"batch_size must be at most {len(workload.train)} (the training {workload.train.kind}), "
            f"got {values['batch_size']}"
        )
    return validated(type(config), {**given, **values})


def _threads(pixels: int) -> int:
    return 1 if pixels < PIXELS_FOR_ONE_THREAD else torch.get_num_threads()
