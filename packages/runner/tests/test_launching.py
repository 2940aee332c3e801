import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import regrad
import torch
from regrad_runner.cli import main
from regrad_runner.config import TrainConfig
from regrad_runner.launching import check_task, make_accelerator
from regrad_runner.results import ResultsFolder
from regrad_runner.storage import checkpoints
from regrad_runner.training import steps_to_target
from regrad_runner.workloads import Measure

SHAPE = ["--train-size", "100", "--batch-size", "20", "--width", "4", "--norm", "group", "--threads", "1"]
INSTALLED = [name for name in ("xgrad", "powergrad") if name in regrad.available()]
WORDS = ["train", *SHAPE, "--epochs", "3", *(["--corrections", *INSTALLED] if INSTALLED else [])]
EASY = Measure(name="test accuracy", target=0.15)


def test_half_precision_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="mixed_precision must be 'no' or 'bf16' without an accelerator device"):
        make_accelerator(TrainConfig(mixed_precision="fp16"))


def test_another_number_of_processes_than_asked_is_refused_with_how_to_launch():
    launch = r"torchrun --nproc-per-node 2 -m regrad_runner …, or on each of M nodes .* --nnodes M"
    with pytest.raises(ValueError, match=f"processes must be 2 as asked, got 1; launch with: {launch}"):
        make_accelerator(TrainConfig(processes=2))


def test_a_launcher_that_started_one_process_of_several_is_found_out(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="processes must be several as asked of accelerate launch, got 1; launch with"):
        make_accelerator(TrainConfig())


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_task()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match=r"srun must start one launcher per node, got 8 tasks .*; use srun"):
        check_task()
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_task()


def test_sharding_where_accelerate_would_train_unsharded_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="use_fsdp must be asked for on accelerator devices, got 'cpu', where"):
        make_accelerator(TrainConfig())


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a launcher has left in it, for CPUs."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "SLURM_"))}
    return {**clean, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def launched(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("one") / "out"
    assert main([*WORDS, "--tracker", "none", "--out", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoints(folder / "checkpoints")[-1] / "tensors.pt", weights_only=True)["model"]


def check_same(several: Path, one: Path) -> None:
    """Assert that a run on several processes is the run of one, and was tracked once."""
    ours, theirs = weights(several), weights(one)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    there, here = ResultsFolder(one), ResultsFolder(several)
    assert [point.value for point in here.curves] == [point.value for point in there.curves]
    assert [result.value for result in here.results] == [result.value for result in there.results]
    assert steps_to_target(here.curves, EASY) == steps_to_target(there.curves, EASY) is not None
    with closing(sqlite3.connect(several / "mlflow.db")) as database:
        assert database.execute("select name, status from runs").fetchall() == [("out", "FINISHED")]
        seen = "select count(*) from metrics where key = 'validation accuracy'"
        assert database.execute(seen).fetchone() == (len(there.curves),)
    assert not (several / "unsent").exists()


ACCELERATE = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], id="torchrun"),
        pytest.param(
            ["accelerate.commands.launch", "--num_processes", "2", *ACCELERATE], id="accelerate", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_end_in_the_weights_of_one_and_are_tracked_as_one_run(tmp_path, one, launcher):
    done = launched([*launcher, "-m", "regrad_runner", *WORDS, "--processes", "2", "--out", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1
    check_same(tmp_path / "out", one)


def test_accelerate_launch_that_starts_one_process_of_two_fails(tmp_path):
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launched([*launch, *plain, "-m", "regrad_runner", "compare", "--seeds", "1", "--tracker", "none"], tmp_path)
    assert done.returncode != 0
    assert "processes must be several as asked of accelerate launch, got 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_number_than_asked_is_said_once_and_nothing_is_written(tmp_path):
    words = ["-m", "regrad_runner", *WORDS, "--processes", "3", "--out", "out"]
    done = launched(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words], tmp_path)
    assert done.returncode != 0
    said = "regrad: processes must be 3 as asked, got 2; launch with: torchrun --nproc-per-node 3"
    assert done.stderr.count(said) == 1
    assert list(tmp_path.iterdir()) == []
