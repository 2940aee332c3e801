"""What every command checks and sets before its first step, without writing a file."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path

import regrad
import torch
from regrad import RegradError
from torch import nn
from torch.optim import Optimizer

from regrad_runner.settings.arms import ALL, Arm, create_all
from regrad_runner.settings.config import CompareConfig, RunConfig, Trained
from regrad_runner.settings.environment import asked_for_deepspeed, asked_to_shard
from regrad_runner.training.building import as_inputs, build_criterion, build_training
from regrad_runner.training.optimizers import build_optimizer
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload
from regrad_runner.workloads.workload import Workload


def load_data(config: Trained) -> tuple[Workload, Trained]:
    """Load the workload, complete the settings with what suits it, and set the CPU threads.

    Raises:
        ValueError: If the workload, its data or a setting is unknown or unfit.
    """
    data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
    workload = load_workload(
        config.workload,
        data_dir=data_dir,
        train_size=config.train_size,
        download=config.download,
        image_size=config.image_size,
    )
    config = resolved(config, workload)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    return workload, config


def example_optimizer(config: RunConfig, *, lr: float) -> Optimizer:
    """Return an optimizer like those of the runs, with a parameter of its own.

    Corrections choose their controls by it.

    Raises:
        ValueError: If it cannot be made.
    """
    return build_optimizer(str(config.optimizer), [nn.Parameter(torch.zeros(1))], lr=lr)


def try_on(arm: Arm, config: RunConfig, workload: Workload, *, lr: float) -> None:
    """Attach an arm's corrections to a model like those of the runs, on trial, with two samples.

    Raises:
        ValueError: If model, optimizer or a correction cannot be made, or samples, model and loss
            do not fit.
        RegradError: If the corrections cannot work here.
    """
    # Corrections that need whole weights refuse shards, and set-ups of DeepSpeed.
    if asked_to_shard() or asked_for_deepspeed():
        TrainingRun(config, workload, arm, seed=0, lr=lr).close()
        return
    model, optimizer = build_training(config, workload, arm, seed=0, lr=lr)
    dtype = next(model.parameters()).dtype
    corrections = create_all(arm)
    criterion = build_criterion(workload, model)
    with (
        torch.random.fork_rng(devices=[]),
        regrad.attach(model, optimizer, corrections, criterion=criterion) as attachment,
    ):
        first_two = list(range(min(2, len(workload.train))))
        inputs, targets = workload.train.with_seed(0).__getitems__(first_two)
        inputs = as_inputs(inputs, dtype).cpu()  # where the model is; samples may lie elsewhere
        try:
            attachment.criterion(model(inputs), targets.cpu())
        except RegradError:  # of a correction that looks at the first forward pass
            raise
        except RuntimeError as problem:
            reason = " ".join(str(problem).split())
            raise ValueError(
                f"model must fit the samples of workload {workload.name!r}, got: {reason}"
            ) from problem


def every_correction(
    config: CompareConfig, workload: Workload, *, lr: float
) -> tuple[CompareConfig, dict[str, str]]:
    """Replace "all" among the corrections by every installed one that works here.

    Each is tried for two steps, on a model and an optimizer like those of the runs.

    Args:
        config: Resolved settings.
        workload: What is trained.
        lr: Learning rate of the trial.

    Returns:
        The settings without "all", and the names of those that cannot work here with the reason.
    """
    if ALL not in config.corrections:
        return config, {}
    fit: list[str] = []
    left_out: dict[str, str] = {}
    for name in regrad.available():
        if name in config.corrections:
            continue
        try:
            _take_two_steps(config, workload, Arm(name, (name,)), lr=lr)
        except (ValueError, TypeError, RuntimeError) as problem:
            left_out[name] = " ".join(str(problem).split())
        else:
            fit.append(name)
    place = config.corrections.index(ALL)
    before = config.corrections[:place]
    after = [text for text in config.corrections[place:] if text != ALL]
    return config.model_copy(update={"corrections": (*before, *fit, *after)}), left_out


def _take_two_steps(config: RunConfig, workload: Workload, arm: Arm, *, lr: float) -> None:
    with closing(TrainingRun(config, workload, arm, seed=0, lr=lr)) as run:
        for _ in islice(run.steps(), 2):
            pass


def default_folder(kind: str, workload: str) -> Path:
    """Return a folder in the current one, whose name says what, on what workload, and when."""
    return Path(f"regrad-{kind}{workload}-{datetime.now():%Y%m%d-%H%M%S}")
