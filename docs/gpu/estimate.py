"""What a comparison will take: its runs and steps, and the time of a step, measured.

Usage: python docs/gpu/estimate.py CONFIG.yaml --data-dir FOLDER --seconds S --jobs N
    [--steps N] [--model NAME] [--epochs N]
"""

from __future__ import annotations

import argparse
import sys
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
    """Print one paragraph."""
    parser = argparse.ArgumentParser(description="Estimate a comparison.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", help="Instead of the settings' own.")
    parser.add_argument("--epochs", type=int, help="Likewise.")
    asked = parser.parse_args()
    given = {"data_dir": asked.data_dir, "model": asked.model, "epochs": asked.epochs}
    flags = {name: value for name, value in given.items() if value is not None}
    workload, config = load_data(load_config(CompareConfig, file=asked.config, flags=flags))
    rates = config.lr or (0.1,)
    arms = expand(
        config.corrections, example_optimizer(config, lr=float(rates[0])), controls=config.controls
    )
    trials = len(arms) * len(rates) * config.tuning_seeds if len(rates) > 1 else 0
    loading, step = measured(config, workload, steps=asked.steps)
    steps = len(workload.train) // int(config.batch_size or 1) * int(config.epochs or 1)
    run_seconds = steps * step
    runs = int(asked.seconds / run_seconds * asked.jobs)
    seeds = max(0, runs - trials) // len(arms)
    sys.stdout.write(
        f"{asked.config.stem}: {len(arms)} arms; {trials} runs choose rates, then {len(arms)} runs "
        f"for each seed, {steps} steps each.\n"
        f"One run alone takes {step * 1000:.2f} ms per step, {loading * 1000:.2f} of them to make "
        f"the batch: {run_seconds:.0f} s. If {asked.jobs} at once did not slow each other down, "
        f"{runs} runs would fit into {asked.seconds:.0f} s, and so {seeds} seeds; of gcgd a run "
        "takes more than twice as long.\n"
    )


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
