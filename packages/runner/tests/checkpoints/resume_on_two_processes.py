"""Under torchrun on two processes: stop, save and resume with every correction, and go on with what one process saved.

Usage: torchrun --nproc-per-node 2 resume_on_two_processes.py FOLDER NAME...
FOLDER/NAME/one holds a checkpoint of one process; FOLDER/NAME/two gets one of two, and FOLDER/out.pt what came out.
"""

import sys
from contextlib import closing
from pathlib import Path

import torch
from regrad_runner.checkpoints.checkpoint import load_latest, save_checkpoint
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import building
from regrad_runner.training.processes import destroy_process_group
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload, make_model

STOP = 7  # of twelve steps, three per epoch


def setting():
    """Return workload and settings, without anything that depends on the number of processes."""
    workload = load_workload("digits", train_size=100)
    config = TrainConfig(
        **{
            "batch_size": 32,
            "epochs": 4,
            "width": 4,
            "norm": "group",
            "threads": 1,
            "evaluations_per_epoch": 2,
        },
        **{"accumulate": 2, "clip_norm": 1.0},
    )
    return workload, resolved(config, workload)


def in_float64(*args, **kwargs):
    return make_model(*args, **kwargs).double()


def make(name):
    workload, config = setting()
    return TrainingRun(
        config, workload, Arm(name or "none", tuple(filter(None, [name]))), seed=3, lr=0.02
    )


def trained(run, *, save=None):
    """Train to the end, saving once on the way; return points and weights."""
    keep = lambda step: save_checkpoint(run, save) if save is not None and step == STOP else None  # noqa: E731
    run.train(on_point=lambda point: None, on_step=keep)
    model = run.accelerator.unwrap_model(run.model)
    return list(run.position.points), {
        name: p.detach().clone() for name, p in model.named_parameters()
    }


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
    exact = (
        again == points
        and lines == []
        and all(torch.equal(weights[key], same[key]) for key in weights)
    )
    _, from_one, lines = continued(name, folder / "one")
    return {"exact": exact, "weights": weights, "from_one": from_one, "lines": lines}


def main(folder, *names):
    building.make_model = in_float64
    results = {name: outcome(name, Path(folder, name or "none")) for name in names}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(folder, "out.pt"))
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
