"""Launches whose processes are killed or told to end: they go on by themselves, to the same bits."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import regrad
import torch
from regrad_runner.checkpoints.folder import checkpoints, read_checkpoint
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder

CLUSTER = Path(__file__).parents[4] / "docs" / "cluster"
CORRECTIONS = [name for name in ("xgrad",) if name in regrad.available()]
STEPS_PER_EPOCH = 40
STEPS = 2 * STEPS_PER_EPOCH
EVERY = 3  # no checkpoint but the last one lies between two epochs
SETTINGS = [
    *["--train-size", "800", "--batch-size", "20", "--width", "4", "--norm", "group"],
    *["--epochs", "2", "--threads", "1", "--checkpoint-every", str(EVERY), "--tracker", "none"],
    *(["--corrections", *CORRECTIONS] if CORRECTIONS else []),
]
SECONDS = 240  # of which a quiet machine needs 15
RESTARTED = re.compile(r"continuing from step (\d+) ")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kills processes that it finds by RANK"),
    pytest.mark.timeout(600),
]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a launcher has left in it, for CPUs."""
    left_over = ("ACCELERATE_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(left_over)}
    cpus = {"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}
    return {**clean, **cpus, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def ended():
    """End what a failed test left running."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for launcher in started:
        with launcher:
            launcher.terminate()


def launch(folder: Path, *, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a training as a user does."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    train = ["-m", "regrad_runner", "train", *SETTINGS, "--resume", "auto", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, "--max-restarts", str(restarts), *train],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return a launcher's exit code, and what was printed and said."""
    out, said = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, out, said


def wait_for_step(launcher: subprocess.Popen[str], out: Path, step: int) -> int:
    """Wait until a training has saved a checkpoint of at least this step; return the last one's."""
    until = time.monotonic() + SECONDS
    saved = 0
    while saved < step:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until, f"step {saved} must become {step}"
        time.sleep(0.01)
        saved = max((int(path.name[-8:]) for path in checkpoints(out / "checkpoints")), default=0)
    return saved


def kill(launcher: subprocess.Popen[str], *, rank: int, restarts: int) -> None:
    """Kill the process of a rank, so that it can do nothing more.

    Args:
        launcher: Which started it.
        rank: Its number.
        restarts: How often the launcher had started all processes again before it started this one.
    """
    wanted = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.Error):  # one that is gone
            if wanted.items() <= process.environ().items():
                process.kill()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(folder / "checkpoints")[-1]
    assert last.name == f"step-{STEPS:08d}"
    return read_checkpoint(last).tensors["model"]


def check_same(folder: Path, whole: Path) -> None:
    """Assert that a run came to the bits of another one, with the same curve."""
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    here, there = ResultsFolder(folder), ResultsFolder(whole)
    numbers = [[(p.step, p.loss, p.value) for p in f.curves] for f in (here, there)]
    assert numbers[0] == numbers[1] != []
    assert [r.value for r in here.results] == [r.value for r in there.results] != []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What two processes make of it that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, said = end_of(launch(folder))
    assert code == 0, said
    return folder / "out"


def test_one_process_that_is_killed_in_mid_epoch_is_started_again_and_goes_on(
    tmp_path, monkeypatch, ended
):
    launcher = launch(tmp_path, processes=1, restarts=1)
    ended.append(launcher)
    monkeypatch.chdir(tmp_path)
    wait_for_step(launcher, tmp_path / "out", 2 * EVERY)
    kill(launcher, rank=0, restarts=0)
    assert main(["train", *SETTINGS, "--out", "whole"]) == 0  # meanwhile
    code, _, said = end_of(launcher)
    assert code == 0, said
    (step,) = map(int, RESTARTED.findall(said))
    assert step % STEPS_PER_EPOCH != 0
    check_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_launch_goes_on_by_itself_when_a_process_is_killed_twice(tmp_path, whole, ended):
    launcher = launch(tmp_path, restarts=3)
    ended.append(launcher)
    killed = wait_for_step(launcher, tmp_path / "out", 2 * EVERY)
    kill(launcher, rank=1, restarts=0)
    # Of the second epoch, and surely saved by the processes that were started again.
    wait_for_step(launcher, tmp_path / "out", max(killed, STEPS_PER_EPOCH) + 2 * EVERY)
    kill(launcher, rank=0, restarts=1)
    code, out, said = end_of(launcher)
    assert code == 0, said
    assert out.count("validation accuracy") == 1
    first, second = map(int, RESTARTED.findall(said))
    assert 2 * EVERY <= first < second < STEPS
    assert first % STEPS_PER_EPOCH != 0 != second % STEPS_PER_EPOCH  # in mid-epoch
    check_same(tmp_path / "out", whole)


MADE_UP = {
    "srun": 'printf %s $$ >launcher; exec "$@"',
    "scancel": 'echo "$*" >>signals; kill -TERM "$(cat launcher)"',
    "scontrol": 'echo "$*" >>requeued',
}


def job(folder: Path, path: str) -> subprocess.Popen[str]:
    """Start a batch script as SLURM starts it, again and again, with a log that is appended to."""
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(CLUSTER / "single_node.sh"), "out", *SETTINGS, "--workers", "1"],
            cwd=folder,
            env=environment(SLURM_JOB_ID="71", SLURM_GPUS_ON_NODE="2", PATH=path),
            stdout=log,
            stderr=log,
        )


@pytest.fixture(scope="module")
def preempted(tmp_path_factory, path_with) -> Path:
    """The folder of a job that SLURM warned in its first epoch, and that has ended."""
    folder = tmp_path_factory.mktemp("preempted")
    batch = job(folder, path_with(folder, **MADE_UP))
    wait_for_step(batch, folder / "out", 2 * EVERY)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(SECONDS) != 0, (folder / "log").read_text()
    return folder


@pytest.mark.slow
def test_a_job_that_is_warned_saves_its_step_asks_to_be_requeued_and_goes_on(
    tmp_path, preempted, whole, path_with
):
    shutil.copytree(preempted, tmp_path / "job")
    folder = tmp_path / "job"
    log = (folder / "log").read_text()
    assert (folder / "signals").read_text() == "--signal=TERM 71\n"
    assert (folder / "requeued").read_text() == "requeue 71\n"
    assert "stopping after this step" in log
    assert "stopped; to continue from here: regrad train --resume --out out" in log
    last = checkpoints(folder / "out" / "checkpoints")[-1]
    assert read_checkpoint(last).state["processes"] == 2
    batch = job(folder, path_with(folder, **MADE_UP))
    assert batch.wait(SECONDS) == 0, (folder / "log").read_text()
    log = (folder / "log").read_text()
    assert RESTARTED.findall(log) == [str(int(last.name[-8:]))]
    check_same(folder / "out", whole)
    assert (folder / "requeued").read_text() == "requeue 71\n"  # nothing is left to do


@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_where_two_were_warned(
    tmp_path, preempted, whole, monkeypatch, capsys
):
    shutil.copytree(preempted / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SETTINGS, "--resume", "auto", "--out", "out"]) == 0
    said = capsys.readouterr().err
    assert "continuing from step" in said
    assert "was written by 2 processes and continues on 1" in said
    ours, theirs = weights(tmp_path / "out"), weights(whole)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-5
