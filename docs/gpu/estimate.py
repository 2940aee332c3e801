"""What a comparison will take: its runs and steps, and the time of a step, measured.

Usage: python docs/gpu/estimate.py CONFIG.yaml --data-dir FOLDER --write FILE.json
    [--steps N] [--model NAME]

Several of these at once measure the time of a step where runs share the device.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from regrad_runner.settings.arms import expand
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.loading import load_config
from regrad_runner.training.preparation import example_optimizer, load_data
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.workload import Workload

WARM_UP = 10


def main() -> None:
    """Write what was counted and measured."""
    parser = argparse.ArgumentParser(description="Estimate a comparison.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", help="Instead of the settings' own.")
    asked = parser.parse_args()
    given = {"data_dir": asked.data_dir, "model": asked.model}
    flags = {name: value for name, value in given.items() if value is not None}
    workload, config = load_data(load_config(CompareConfig, file=asked.config, flags=flags))
    rates = config.lr or (0.1,)
    arms = expand(
        config.corrections, example_optimizer(config, lr=float(rates[0])), controls=config.controls
    )
    trials = len(arms) * len(rates) * config.tuning_seeds if len(rates) > 1 else 0
    loading, step = measured(config, workload, steps=asked.steps)
    found = {
        "arms": len(arms),
        "trials": trials,
        "epochs": int(config.epochs or 1),
        "steps_per_epoch": len(workload.train) // int(config.batch_size or 1),
        "seconds_per_step": step,
        "seconds_per_batch": loading,
    }
    asked.write.write_text(json.dumps(found), encoding="utf-8")


def measured(config: CompareConfig, workload: Workload, *, steps: int) -> tuple[float, float]:
    """Return the seconds that making a batch takes, and those of a whole step of the baseline."""
    baseline = expand((), example_optimizer(config, lr=0.1), controls=False)[0]
    run = TrainingRun(config, workload, baseline, seed=0, lr=0.1)
    loading = _seconds_per_batch(run, steps)
    seen = run.steps()
    for _ in range(min(WARM_UP, run.total_steps // 2)):
        next(seen)
    _wait()
    start = time.perf_counter()
    done = sum(1 for _, _ in zip(range(steps), seen, strict=False))
    _wait()
    step = (time.perf_counter() - start) / max(1, done)
    run.close()
    return loading, step


def _seconds_per_batch(run: TrainingRun, steps: int) -> float:
    """Return the seconds that one batch takes to be made."""
    batches = iter(run.loader)
    next(batches)
    _wait()
    start = time.perf_counter()
    made = sum(1 for _, _ in zip(range(steps), batches, strict=False))
    _wait()
    return (time.perf_counter() - start) / max(1, made)


def _wait() -> None:
    """Wait for the device, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
