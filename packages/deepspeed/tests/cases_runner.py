"""What the processes of the tests run: `regrad train`'s own loop with DeepSpeed inside.

`alone` is the same without DeepSpeed on one process, `with_ddp` on two.
"""

import os
import warnings
from contextlib import closing
from pathlib import Path

import torch
from regrad.errors import RegradError
from regrad_runner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

NONE = Arm("baseline")
SEVERAL = Arm("several", ("xgrad", "powergrad", "agc:max_ratio=0.05"))
# (arm, settings, the step whose batch is not a number, if one is)
CASES = {
    "baseline": (NONE, {}, None),
    "clipped": (NONE, {"clip_norm": 0.2}, None),
    "corrected": (SEVERAL, {"clip_norm": 0.2, "accumulate": 2}, None),
    "adamw": (Arm("powergrad", ("powergrad",)), {"optimizer": "adamw", "accumulate": 2}, None),
    "not finite": (SEVERAL, {"clip_norm": 0.2, "accumulate": 2}, 3),
}
SAVED_AT = 4


def setting(arm, **values):
    """Return the arguments of a run."""
    digits = load_workload("digits", train_size=96)
    small = {
        "batch_size": 32,
        "epochs": 2,
        "width": 4,
        "norm": "group",
        "threads": 1,
        "evaluations_per_epoch": 1,
    }
    return resolved(TrainConfig(**small, **values), digits), digits, arm


def run_of(case):
    """Return a new run of a case, which meets a batch that is not a number where the case does."""
    arm, values, poisoned = CASES[case]
    run = TrainingRun(*setting(arm, **values), seed=0, lr=0.05)
    if poisoned is not None:
        run.on_micro_batch = lambda inputs, targets: poison(run, inputs, poisoned)
    return run


def poison(run, inputs, step):
    """Put what is no number into the batch of one step, of the last process alone."""
    last = run.accelerator.process_index == run.accelerator.num_processes - 1
    if last and run.position.step + 1 == step:
        inputs.fill_(torch.nan)


def weights_of(run):
    """Return copies of the whole weights by name. Collective with DeepSpeed."""
    model = run.accelerator.unwrap_model(run.model)
    if run.engine is None:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}


def train(run, folder=None):
    """Train to the end, saving on the way; return what came of it and the checkpoint."""
    saved = []

    def on_step(step):
        if step == SAVED_AT and folder is not None:
            saved.append(save_checkpoint(run, folder))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="loss or gradients of step")
        run.train(on_point=lambda point: None, on_step=on_step)
    came = {
        "weights": weights_of(run),
        "values": [point.value for point in run.position.points],
        "losses": [point.loss for point in run.position.points],
        "skipped": run.watch.skipped,
        "applied": run.attachment.metrics()["steps_applied"],
        "norms": [float(cell) for cell in run.watch.table().splitlines()[-1].split(",")[2:]],
    }
    return came, saved[0] if saved else None


def alone():
    """Return what each case ends with on one process, without DeepSpeed."""
    found = {}
    for case in CASES:
        with closing(run_of(case)) as run:
            found[case], _ = train(run)
    return found


def with_ddp(rank, folder):
    """Train each case as one of two processes of torch's DDP; the first writes the weights."""
    weights = {}
    for case in CASES:
        with closing(run_of(case)) as run:
            came, _ = train(run)
        weights[case] = came["weights"]
    if rank == 0:
        torch.save(weights, Path(folder, "out.pt"))


def with_engine(rank, stage, folder):
    """Train and resume each case as one of two processes; the first writes what came of it."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    found = {}
    for case in CASES:
        with closing(run_of(case)) as run:
            came, path = train(run, Path(folder, case))
            came["layout"] = run.attachment.engine.layout.name
            came["notes"] = run.receipt()["notes"]
        with closing(run_of(case)) as again:
            load_checkpoint(again, path)
            resumed, _ = train(again)
        came["same"] = all(
            torch.equal(resumed["weights"][name], weight)
            for name, weight in came["weights"].items()
        )
        came["same counts"] = all(resumed[key] == came[key] for key in ("skipped", "applied"))
        came["files"] = sorted(file.name for file in (path / "engine").iterdir())
        found[case] = came
    found["refused"] = refused(stage, path)
    if rank == 0:
        torch.save(found, Path(folder, "out.pt"))


def refused(stage, path):
    """Return what is said of checkpoints that do not fit, and whether anything was changed."""
    said = {}
    others = {
        "corrections": (Arm("xgrad", ("xgrad",)), {"clip_norm": 0.2, "accumulate": 2}),
        "order": (
            Arm("several", ("agc:max_ratio=0.05", "powergrad", "xgrad")),
            {"clip_norm": 0.2, "accumulate": 2},
        ),
        "settings": (SEVERAL, {"clip_norm": 0.1, "accumulate": 2}),
    }
    for name, (arm, values) in others.items():
        with closing(TrainingRun(*setting(arm, **values), seed=0, lr=0.05)) as run:
            before = weights_of(run)
            said[name] = refusal(load_checkpoint, run, path)
            after = weights_of(run)
        said[f"{name} unchanged"] = all(torch.equal(after[key], before[key]) for key in before)
    return said


def refusal(call, *arguments):
    """Return what a call raises, in words."""
    try:
        call(*arguments)
    except RegradError as error:
        return str(error)
    return ""
