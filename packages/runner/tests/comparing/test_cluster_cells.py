"""Comparisons whose runs are jobs: of submitit's local executor, and of a SLURM that is made up."""

import csv
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from regrad_runner.cli.main import main
from regrad_runner.comparing import cluster_cells, queues
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import read_record

SMALL = ["--train-size", "100", "--batch-size", "25", "--width", "4", "--epochs", "1"]
HERE = Path(__file__).parent

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit, of the extra slurm"
)
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("without_page", "without_timing")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(
        "corrections: []\nlr: [0.02, 0.1]\ntuning_seeds: 1\ntuning_extensions: 1\nseeds: 2\n"
    )
    return tmp_path


def compare(*words) -> int:
    return main(["compare", *SMALL, "--tracker", "none", *words])


def curves_and_results(folder: Path) -> list[list[dict]]:
    """What the tables of a comparison without trials hold, without what the clock says."""
    found = []
    for name in ("curves.csv", "results.csv"):
        with (folder / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        found.append([{k: v for k, v in row.items() if "seconds" not in k} for row in rows])
    assert all(found)
    return found


def comparable(shown: dict) -> dict:
    """What a report says without what the clock says."""
    arms = [{name: arm[name] for name in arm if "time" not in name} for arm in shown["arms"]]
    return {
        **{name: shown[name] for name in ("measure", "learning_rates") if name in shown},
        "arms": arms,
    }


@needs_submitit
def test_local_jobs_end_with_the_tables_and_the_report_of_a_serial_comparison(here, capsys, tables):
    assert compare("--config", "two.yaml", "--jobs", "1", "--json", "--out", "serial") == 0
    serial = json.loads(capsys.readouterr().out)
    words = ["--config", "two.yaml", "--on", "local", "--jobs", "2", "--json", "--out", "out"]
    assert compare(*words) == 0
    said = capsys.readouterr()
    assert "2 at once" in said.err
    assert "estimated" not in said.err  # what a job takes to start is not known
    assert tables(here / "out") == tables(here / "serial")
    assert len(tables(here / "out")["tuning.csv"]) == 3  # with a rate that was added
    assert comparable(json.loads(said.out)) == comparable(serial)
    listed = [line.split("\t") for line in (here / "out/jobs/cells.tsv").read_text().splitlines()]
    assert sorted(name for _, _, name, _ in listed)[-2:] == ["baseline, seed 0", "baseline, seed 1"]
    assert all("learning rate" in (here / "out/jobs" / log).read_text() for *_, log in listed)
    assert not list((here / "out/runs").glob("*/*/checkpoints"))


class Killer(threading.Thread):
    """Kills the process of a cell, once, when it has a checkpoint."""

    def __init__(self, run: Path):
        super().__init__(daemon=True)
        self.run_folder = run
        self.killed = None

    def run(self):
        while not list(self.run_folder.glob("checkpoints/step-*")):
            time.sleep(0.005)
        for child in psutil.Process().children(recursive=True):
            if "submitit.core._submit" in child.cmdline():
                child.kill()
                self.killed = child.pid
                return


@pytest.mark.long
@needs_submitit
def test_a_job_that_is_killed_goes_on_from_its_checkpoint_to_the_same_numbers(
    here, capsys, monkeypatch
):
    monkeypatch.setattr(cluster_cells, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    words = ["--config", "none.yaml", "--seeds", "1", "--epochs", "10"]
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\n")
    assert compare(*words, "--jobs", "1", "--out", "serial") == 0
    killer = Killer(here / "out" / "runs" / "baseline" / "0")
    killer.start()
    assert compare(*words, "--on", "local", "--out", "out") == 0
    assert killer.killed
    said = capsys.readouterr().err
    assert "baseline, seed 0: job " in said
    assert "was lost; submitted again" in said
    assert curves_and_results(here / "out") == curves_and_results(here / "serial")
    logs = "".join(log.read_text() for log in (here / "out/jobs").glob("*.err"))
    assert "baseline, seed 0: continuing from step" in logs


@pytest.mark.long
@needs_submitit
def test_a_job_that_is_lost_again_and_again_and_one_that_raises_are_failed_runs(
    here, capsys, monkeypatch
):
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\nseeds: 1\n")
    monkeypatch.setattr(cluster_cells, "MOST_ATTEMPTS", 2)
    monkeypatch.setattr(cluster_cells, "CellJob", _by_value("os._exit(9)"))
    assert compare("--config", "none.yaml", "--on", "local", "--out", "lost") == 1
    said = capsys.readouterr().err
    assert said.count("was lost; submitted again") == 1
    assert "baseline, seed 0 failed: job " in said
    assert [result.status for result in ResultsFolder(here / "lost").results] == ["failed"]
    monkeypatch.setattr(cluster_cells, "CellJob", _by_value("raise ValueError('no data here')"))
    assert compare("--config", "none.yaml", "--on", "local", "--out", "raised") == 1
    said = capsys.readouterr().err
    assert "submitted again" not in said
    assert "ValueError: no data here; its log is " in said


def _by_value(body: str):
    """Return a job that does something else; defined here, so that it is pickled whole."""
    source = (
        "import os\nclass Job:\n    def __init__(self, **_):\n        pass\n"
        f"    def __call__(self, task):\n        {body}\n"
    )
    space: dict = {"__name__": "__main__"}
    exec(source, space)
    return space["Job"]


LIGHT = shlex.join([sys.executable, str(HERE / "light_launcher.py")])


@pytest.mark.long
@needs_submitit
def test_a_script_of_ones_own_runs_in_jobs_to_the_results_of_a_serial_comparison(here, capsys):
    (here / "train.py").write_text(
        "import os, sys\nprint('loss', int(sys.argv[1]) + bool(os.environ['CORRECTIONS']))\n"
    )
    measure = ["--measure", "loss=loss ([0-9.]+)", "--lower-is-better", "--seeds", "1"]
    words = ["compare", "--corrections", "xgrad", "--no-controls", *measure, "--tracker", "none"]
    words += ["--launcher", LIGHT]
    script = ["--", "train.py", "{seed}"]
    assert main([*words, "--jobs", "1", "--out", "serial", *script]) == 0
    assert main([*words, "--on", "local", "--jobs", "2", "--out", "out", *script]) == 0
    assert curves_and_results(here / "out") == curves_and_results(here / "serial")
    assert (here / "out/runs/xgrad/0/output.txt").read_text() == "loss 1\n"


@needs_submitit
@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_and_says_how_to_continue(here):
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\nseeds: 1\n")
    words = ["--config", "none.yaml", "--epochs", "5000", "--on", "local", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "regrad_runner", "compare", *SMALL, "--tracker", "none", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (here / "out/runs/baseline/0/run.json").is_file():
            time.sleep(0.05)
        jobs = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped; to continue from here: regrad compare --resume --out out --on local" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(jobs, timeout=60)
    assert alive == []
    assert read_record(here / "out/runs/baseline/0").status == "killed"


def test_without_submitit_one_line_says_what_to_install_and_nothing_is_written(
    here, capsys, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        queues.importlib.util, "find_spec", lambda name: None if name == "submitit" else find(name)
    )
    assert compare("--on", "local", "--out", "out") == 2
    said = capsys.readouterr().err
    assert said == (
        "regrad: --on local must find submitit, got none; pip install regrad-runner[slurm]\n"
    )
    assert not (here / "out").exists()


WRONG = {
    ("--on", "cloud"): "on must be one of here, local, slurm, got 'cloud'",
    ("--on", "slurm", "--slurm", "partion=gpu"): "no --slurm setting named 'partion'",
    ("--slurm", "partition=gpu"): "slurm must be given with --on slurm, got --on here",
    ("--on", "slurm", "--jobs", "3"): "limit the jobs with --slurm array_parallelism=3",
    ("--on", "local", "--cells"): "--on must be given without --cells and --cell",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items())
def test_what_cannot_be_is_refused_before_anything_is_written(here, capsys, words, message):
    assert compare(*words, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@needs_submitit
def test_a_machine_without_slurm_is_refused(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    assert compare("--on", "slurm", "--out", "out") == 2
    assert "--on slurm must find sbatch, srun, squeue, scancel, got no 'sbatch' in the PATH" in (
        capsys.readouterr().err
    )
    assert not (here / "out").exists()


@pytest.fixture
def slurm(here, monkeypatch, fake_slurm):
    """A SLURM that is made up, and looked at often."""
    place = fake_slurm.install(here)
    known = here / "slurm" / "known"
    known.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(place), os.environ["PATH"]]))
    monkeypatch.setenv("FAKE_SLURM", str(known))
    monkeypatch.setattr(queues, "SECONDS_BETWEEN_QUEUES", 0.2)
    monkeypatch.setattr(queues.SlurmJobs, "seconds", 0.1)
    monkeypatch.setattr(queues.SlurmJobs, "patience", 0.5)
    return known


@pytest.fixture(scope="session")
def fake_slurm():
    spec = importlib.util.spec_from_file_location("fake_slurm", HERE / "fake_slurm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_submitit
def test_what_sbatch_refuses_is_said_in_its_words(slurm, here, capsys):
    (slurm / "refusal").write_text("sbatch: error: invalid partition specified: gpuu\n")
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\nseeds: 2\n")
    words = ["--config", "none.yaml", "--on", "slurm", "--slurm", "partition=gpuu"]
    assert compare(*words, "--out", "out") == 1
    said = capsys.readouterr().err
    assert said.count("invalid partition specified") == 1
    assert (
        "regrad: sbatch must take the jobs, got 'sbatch: error: invalid partition specified: gpuu'; "
        "correct --slurm, and continue with --resume\n" in said
    )
    assert "Traceback" not in said


@pytest.mark.long
@needs_submitit
def test_jobs_that_an_earlier_command_left_in_the_queue_are_named(slurm, here, capsys):
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\nseeds: 1\n")
    assert compare("--config", "none.yaml", "--cells", "--out", "out") == 0
    (here / "out" / "jobs").mkdir()
    (here / "out" / "jobs" / "cells.tsv").write_text(
        "slurm\t100_0\tbaseline, seed 0\tlog\nslurm\t100_1\tx\tlog\nlocal\t7\tx\tlog\n-x\n"
    )
    (slurm / "100.options").touch()
    (slurm / "100_1.queued").touch()
    capsys.readouterr()
    assert main(["compare", "--resume", "--out", "out", "--on", "slurm"]) == 1
    said = capsys.readouterr().err
    assert (
        "regrad: jobs of an earlier command must have ended, got 1 in the queue, such as 100_1; "
        "wait for them, or end them: scancel 100\n" in said
    )
    assert not (here / "out" / "runs").exists()


class Preempting(threading.Thread):
    """Preempts one task with submitit's signal, and ends another one as a node that fails."""

    def __init__(self, fake_slurm, out: Path):
        super().__init__(daemon=True)
        self.fake_slurm = fake_slurm
        self.out = out
        self.done = []

    def run(self):
        for index, number in ((0, signal.SIGUSR2), (1, signal.SIGKILL)):
            run = self.out / "runs" / "baseline" / str(index) / "run.json"
            while not run.is_file() or not list(run.parent.glob("checkpoints/step-*")):
                time.sleep(0.005)
            self.fake_slurm.kill(f"100_{index}", number)
            self.done.append(index)


@pytest.mark.long
@needs_submitit
def test_jobs_of_slurm_that_are_preempted_or_lost_end_with_the_tables_of_a_serial_comparison(
    slurm, here, capsys, monkeypatch, fake_slurm
):
    monkeypatch.setattr(cluster_cells, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    (here / "none.yaml").write_text("corrections: []\nlr: [0.05]\nseeds: 2\n")
    words = ["--config", "none.yaml", "--epochs", "10"]
    assert compare(*words, "--jobs", "1", "--out", "serial") == 0
    preempting = Preempting(fake_slurm, here / "out")
    preempting.start()
    asked = "partition=gpu,account=me,time=01:00:00,cpus_per_task=2,mem=4G,array_parallelism=1"
    assert compare(*words, "--on", "slurm", "--slurm", asked, "--out", "out") == 0
    said = capsys.readouterr().err
    assert preempting.done == [0, 1]
    assert "as jobs of SLURM, 1 at once" in said
    assert "job 100_1 was lost (NODE_FAIL); submitted again" in said
    assert "100_0" not in said  # submitit itself had it requeued
    assert curves_and_results(here / "out") == curves_and_results(here / "serial")
    options = eval((slurm / "100.options").read_text())
    assert options["array"] == "0-1%1"
    assert (options["partition"], options["account"], options["time"]) == ("gpu", "me", "60")
    assert (options["cpus-per-task"], options["mem"], options["ntasks"]) == ("2", "4G", "1")
    assert {"requeue", "signal", "open-mode"} <= options.keys()
    assert "Requeued job 100_0" in (here / "out/jobs/100_0_0_log.out").read_text()
    for log in ("100_0_0_log.err", "200_0_log.err"):
        assert "continuing from step" in (here / "out/jobs" / log).read_text()
