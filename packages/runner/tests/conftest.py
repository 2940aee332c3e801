import csv
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.state import AcceleratorState
from regrad_runner.diagnostics.effects import Effect, keep_effects
from regrad_runner.diagnostics.gradient_quality import Quality, keep_quality
from regrad_runner.diagnostics.step_times import StepTime, keep_step_times
from regrad_runner.results.about import LAYOUT
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.points import Point, keep_point
from regrad_runner.results.run import begin_run
from regrad_runner.tracking import stores
from regrad_runner.tracking.stores import Store
from regrad_runner.training import building
from regrad_runner.workloads.loading import make_model
from regrad_runner.workloads.workload import Measure

SCRIPT, IMAGE = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'
LONG = "xgrad:horizon=2.5,decoupled_decay=0.001+powergrad:alpha=0.125 & more $x_1$"
ARMS = ("baseline", SCRIPT, IMAGE, LONG, "nesterov")
TIMES = {"step_seconds", "seconds"}
SEEDS, STEPS = 6, range(10, 81, 10)


@pytest.fixture
def without_page(monkeypatch):
    """Leave out the page of a comparison, which has tests of its own and takes seconds to draw."""
    monkeypatch.setattr("regrad_runner.reporting.page.write.write_page", lambda *arguments: [])


@pytest.fixture
def without_timing(monkeypatch):
    """Leave out the time per step at the end of a comparison, which has tests of its own."""
    monkeypatch.setattr("regrad_runner.comparing.compare.time_steps", lambda *arguments: None)


@pytest.fixture(scope="session")
def schema(tmp_path_factory):
    """Return a database of MLflow to copy: making one takes seconds."""
    folder = tmp_path_factory.mktemp("schema")
    Store(folder).client()
    return folder / "mlflow.db"


@pytest.fixture
def ready_schema(schema, monkeypatch):
    """Let a new database be a copy of one that was made before."""
    monkeypatch.setattr(stores, "_make", lambda path: shutil.copyfile(schema, path))


@pytest.fixture(scope="session")
def tables():
    """Return what the tables of a comparison's folder hold, without what the clock says."""

    def read(folder):
        found = {}
        for name in ("tuning.csv", "curves.csv", "results.csv"):
            with (folder / name).open(newline="") as file:
                found[name] = [
                    {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)
                ]
        return found

    return read


@pytest.fixture(scope="session")
def ended_run():
    """Write the folder of a run that ended with a result."""

    def write(path, result, points=()):
        name = f"{result.arm}, seed {result.seed}"
        values = {"name": name, "arm": result.arm, "seed": result.seed, "lr": result.lr}
        with begin_run(path, values) as record:
            for point in points:
                keep_point(record, point)
            record.end(result.status, result=numbers_of(result))
        return record

    return write


@pytest.fixture(scope="session")
def names():
    """Return what the arms of `make_comparison` are called: two of them would act if a page took them for HTML."""
    return SimpleNamespace(arms=ARMS, script=SCRIPT, image=IMAGE, long=LONG)


@pytest.fixture(scope="session")
def make_comparison():
    """Write the folder of a comparison that nobody ran, with names of arms that want to be more than text."""

    def make(path, *, seeds=SEEDS, target=0.9, old=False):
        path.mkdir(parents=True, exist_ok=True)
        for arm in ARMS:
            for seed in range(seeds):
                add_run(path, arm, seed, old=old)
        settings = {
            "workload": "digits",
            "corrections": [SCRIPT, IMAGE, LONG],
            "seeds": seeds,
            "epochs": 4,
            "lr": [0.1],
        }
        settings |= {
            "model": IMAGE,
            "optimizer": "sgd",
            "controls": True,
            "tracker": "none",
            "tracking_uri": "http://me:secret@127.0.0.1:1",
        }
        (path / "config.yaml").write_text(yaml.safe_dump(settings))
        about = {
            "layout": LAYOUT,
            "kind": "comparison",
            "workload": SCRIPT,
            "measure": asdict(Measure(target=target)),
        }
        if not old:
            keep_step_times(path, {arm: step_time_of(arm) for arm in ARMS[1:]})
        machine = {"since": "2026-01-01", "processor": "abacus", "versions": {"torch": "2.15.0"}}
        more = {"left_out": {"agc": "<b>no</b>"}, "processes": 1, "machines": [machine]}
        more |= {"samples": IMAGE, "sizes": {"train": 800, "validation": 179, "test": 360}}
        (path / "about.json").write_text(json.dumps(about if old else about | more))
        return ResultsFolder(path)

    return make


def step_time_of(arm):
    """Return what was measured of an arm."""
    ratio = 1 + 0.1 * ARMS.index(arm)
    return StepTime(
        ratio=ratio,
        interval=(ratio - 0.01, ratio + 0.02),
        pairs=30,
        seconds=0.01 * ratio,
        baseline_seconds=0.01,
    )


def add_run(path, arm, seed, *, old):
    """Add one run; in an old folder without what was not kept then."""
    shift = 0.01 * ARMS.index(arm) + 0.004 * math.sin(seed * (1 + ARMS.index(arm)))
    points = [
        Point(
            step=step,
            epoch=step / 20,
            loss=2 * math.exp(-step / 30) + shift,
            value=(0.9 + shift) * (1 - math.exp(-step / 15)),
            lr=0.1,
            seconds=None if old else step * (0.01 + 0.001 * seed),
        )
        for step in STEPS
    ]
    corrected = arm in ARMS[1:4]
    result = Result(
        arm=arm,
        seed=seed,
        value=0.9 + shift,
        validation=points[-1].value,
        steps=80,
        steps_to_target=None if arm == IMAGE and seed < 2 else 50 + 2 * seed,
        step_seconds=0.01 + 0.001 * ARMS.index(arm),
        seconds=1.0,
        touched=corrected,
        lr=0.1,
        must_beat="nesterov" if corrected else None,
        control=None if old else arm == "nesterov",
    )
    time.sleep(0.002)  # runs are shown in the order in which they began
    values = {"name": f"{arm}, seed {seed}", "arm": arm, "seed": seed, "lr": 0.1}
    with begin_run(path, values) as record:
        for point in points:
            keep_point(record, point)
        if not old:
            add_measurements(record, arm, seed, shift if corrected else 0.0)
        write_receipt(record, arm, corrected=corrected)
        record.end("finished", result=numbers_of(result))
    if seed == 0:
        add_trial(path, arm, lr=0.1, validation=0.8)
        add_trial(path, arm, lr=0.3, validation=0.7)


def add_trial(path, arm, *, lr, validation):
    """Add one run of the choice of a learning rate."""
    values = {"name": f"{arm}, lr {lr}", "arm": arm, "seed": 1_000_000, "lr": lr, "trial": True}
    with begin_run(path, values) as record:
        record.end("finished", result={"validation": validation})


def add_measurements(record, arm, seed, shift):
    """Add effects and probes of one run."""
    numbers = {"share_touched": 1.0, "cosine": 0.9, "trigger_rate": 0.5, "non_finite": 0.0}
    effects = [
        Effect(
            arm=arm,
            seed=seed,
            step=step,
            correction="xgrad",
            stage=stage,
            relative_change=size + shift / 100,
            **numbers,
        )
        for step in STEPS
        for stage, size in (("weights", 0.01), ("gradient", 0.5))
    ]
    keep_effects(record, effects if shift else [])
    raw = {"cosine_raw": 0.4, "norm_ratio_raw": 1.5, "norm_ratio_corrected": 1.5 - shift}
    for step in STEPS:
        if step % 20 == 0:
            keep_quality(
                record, Quality(arm=arm, seed=seed, step=step, cosine_corrected=0.4 + shift, **raw)
            )


def write_receipt(record, arm, *, corrected):
    """Write what a run says that it did."""
    part = {
        "name": "xgrad",
        "distribution": IMAGE,
        "version": "0.1.0",
        "options": {"horizon": SCRIPT},
        "stages": ["weights"],
    }
    seen = {"share_touched": 1.0, "relative_change": 0.0123, "cosine": 0.99, "trigger_rate": 1.0}
    control = {"name": "nesterov", "optimizer": {"nesterov": True}, "head_init": 1.0}
    receipt = {
        "corrections": [part] if corrected else [],
        "order": ["xgrad"] if corrected else [],
        "notes": [SCRIPT],
        "effects": {"xgrad": {"weights": seen}} if corrected else {},
        "environment": {"python": "3.11", "torch": "2.15.0", "device": "cpu"},
        "run": {"control": control if arm == "nesterov" else None},
    }
    record.keep("receipt.json", json.dumps(receipt))


@pytest.fixture
def in_float64(monkeypatch):
    """Let every model be one of float64."""

    def make(*args, **kwargs):
        return make_model(*args, **kwargs).double()

    monkeypatch.setattr(building, "make_model", make)


@pytest.fixture
def fresh_precision():
    """Forget the precision that Accelerate was asked for first, before and after the test."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def path_with():
    """Return a function that makes up commands that this machine has not, such as SLURM's."""

    def make(folder, **scripts):
        """Write them, and return a PATH with them and this environment's."""
        for name, body in scripts.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
            path.chmod(0o755)
        own = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return os.pathsep.join(own)

    return make
