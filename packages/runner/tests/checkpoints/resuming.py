"""Stop, save and resume with every correction, on one process and on two.

In a folder, NAME/one holds a checkpoint of one process; NAME/two gets one of two, and
out.pt what came out.
"""

from contextlib import closing
from pathlib import Path

import torch
from regrad_runner.checkpoints.checkpoint import load_latest, save_checkpoint
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import building
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload, make_model

STOP = 7  # of twelve steps, three per epoch


def setting():
    """Return workload and settings, without anything that depends on the number of processes."""
    workload = load_workload("digits", train_size=100)
    config = TrainConfig(
        batch_size=32,
        epochs=4,
        width=4,
        norm="group",
        threads=1,
        evaluations_per_epoch=2,
        accumulate=2,
        clip_norm=1.0,
    )
    return workload, resolved(config, workload)


def in_float64(*args, **kwargs):
    return make_model(*args, **kwargs).double()


def make(name):
    workload, config = setting()
    arm = Arm(name, (name,)) if name else Arm("baseline")
    return TrainingRun(config, workload, arm, seed=3, lr=0.02)


def trained(run, *, save=None):
    """Train to the end, saving once on the way; return points and weights."""

    def keep(step):
        if save is not None and step == STOP:
            save_checkpoint(run, save)

    run.train(on_point=lambda point: None, on_step=keep)
    model = run.accelerator.unwrap_model(run.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return list(run.position.points), weights


def continued(name, folder):
    """Go on in a run of its own; return points, weights and what was said."""
    with closing(make(name)) as run:
        path, lines = load_latest(run, folder)
        if path is None or run.position.step != STOP:
            raise RuntimeError(f"checkpoint must be of step {STOP}, got {path}")
        return *trained(run), lines


def outcome(name, folder):
    with closing(make(name)) as run:
        points, weights = trained(run, save=folder / "two")
    again, same, lines = continued(name, folder / "two")
    is_same = all(torch.equal(weights[key], same[key]) for key in weights)
    exact = again == points and lines == [] and is_same
    _, from_one, lines = continued(name, folder / "one")
    return {"exact": exact, "weights": weights, "from_one": from_one, "lines": lines}


def outcomes(rank, folder, names):
    """Train, resume and change the number of processes, with each correction, as one of two."""
    building.make_model = in_float64
    results = {name: outcome(name, Path(folder, name or "baseline")) for name in names}
    if rank == 0:
        torch.save(results, Path(folder, "out.pt"))
