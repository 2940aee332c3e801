import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import regrad
from regrad_runner.cli.main import main
from regrad_runner.comparing import workers
from regrad_runner.comparing.plan import make_plan, suitable_jobs
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.machine import usable_cores
from regrad_runner.settings.config import CompareConfig

SMALL = ["--train-size", "100", "--batch-size", "25", "--width", "4"]

pytestmark = pytest.mark.timeout(700)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text(
        "corrections: []\nepochs: 4\nlr: [0.05, 1.0e+30]\ntuning_seeds: 1\ntuning_extensions: 0\nseeds: 2\n"
    )
    return tmp_path


def tracked(folder: Path, what: str) -> list[tuple]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(what).fetchall()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:loss or gradients of step:regrad.errors.RegradWarning")
def test_two_jobs_give_the_tables_of_one_and_name_the_cell_that_fails(here, capsys, tables):
    arms = ["--corrections", "xgrad", "--no-controls"] if "xgrad" in regrad.available() else []
    words = ["compare", *SMALL, "--config", "few.yaml", *arms]
    assert main([*words, "--jobs", "1", "--tracker", "none", "--out", "serial"]) == 0
    capsys.readouterr()
    assert main([*words, "--jobs", "2", "--out", "out"]) == 0
    said = capsys.readouterr().err
    assert (
        "baseline, lr 1e+30, trial 1 failed: NonFiniteError: loss or gradients were not finite in 10 steps"
        in said
    )
    assert tables(here / "out") == tables(here / "serial")
    assert {row["lr"] for row in tables(here / "out")["results.csv"]} == {"0.05"}
    assert (here / "out" / "runs" / "baseline" / "1" / "receipt.json").is_file()
    runs = {
        name: (run, status)
        for name, run, status in tracked(here / "out", "select name, run_uuid, status from runs")
    }
    assert len(runs) == (9 if arms else 5)
    assert {status for name, (_, status) in runs.items() if "1e+30" not in name} == {"FINISHED"}
    assert runs["baseline, lr 1e+30, trial 1"][1] == "FAILED"
    children = tracked(here / "out", "select value from tags where key = 'mlflow.parentRunId'")
    assert children == [(runs["out"][0],)] * (len(runs) - 1)


def test_workers_keep_memory_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    with workers._keeping_memory():
        assert os.environ["MALLOC_TRIM_THRESHOLD_"] == str(2**28)
        assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "4096"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "4096"


@pytest.mark.parametrize(("cells", "expected"), [(0, 0), (2, 2), (9, 3)])
def test_workers_start_before_there_is_a_cell_to_run_but_no_more_than_cells(
    here, monkeypatch, cells, expected
):
    started = []

    def start(self):
        started.append(self)

    monkeypatch.setattr(workers.Workers, "_start", start)
    plan = make_plan(CompareConfig(**LARGE), out=here / "out", jobs=3)
    with workers.Workers(plan, None, cells=cells):
        assert len(started) == expected


@pytest.mark.long
def test_rates_that_arms_add_are_the_same_for_any_jobs(here, capsys, tables):
    words = ["compare", *SMALL, "--config", "few.yaml", "--epochs", "1", "--tracker", "none"]
    words += ["--lr", "0.01,0.02", "--tuning-extensions", "2"]
    assert main([*words, "--jobs", "1", "--out", "serial"]) == 0
    assert main([*words, "--jobs", "2", "--out", "out"]) == 0
    assert "2 at once" in capsys.readouterr().err
    assert tables(here / "out") == tables(here / "serial")
    assert len({row["lr"] for row in tables(here / "out")["tuning.csv"]}) > 2


def children_of(process: subprocess.Popen) -> list[int]:
    """Return the worker processes, which have the marks of multiprocessing in their command lines."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def _kill_one_and_stop(process: subprocess.Popen) -> tuple[list[int], str]:
    """Kill a worker, and press Ctrl-C some runs later; return who worked then, and what was said."""
    lines = iter(process.stderr.readline, "")
    next(line for line in lines if line.startswith("[  1/500]"))
    os.kill(children_of(process)[0], signal.SIGKILL)
    killed = next(line for line in lines if "its process ended" in line)
    assert killed.endswith(" failed: its process ended with exit code -9\n")
    next(line for line in lines if line.startswith("["))
    workers = children_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=400)
    return workers, said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="worker processes are looked up in /proc")
def test_a_worker_that_is_killed_costs_its_run_and_ctrl_c_ends_all_of_them_as_killed(here):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [
        "-m",
        "regrad_runner",
        "compare",
        *SMALL,
        "--config",
        "few.yaml",
        "--lr",
        "0.05",
        "--seeds",
        "500",
    ]
    process = subprocess.Popen(
        [sys.executable, *words, "--jobs", "2", "--out", "out"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        workers, said = _kill_one_and_stop(process)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped; to continue from here: regrad compare --resume --out out --jobs 2" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    main(["sync", "out"])  # what a busy machine did not deliver in time
    statuses = dict(tracked(here / "out", "select name, status from runs"))
    assert statuses.pop("out") == "KILLED"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    folder = ResultsFolder(here / "out")
    assert [result.status for result in folder.results].count("failed") == 1
    assert len(folder.results) >= 2


LARGE = {"workload": "digits", "batch_size": 1024, "corrections": (), "tracker": "none"}


@pytest.mark.parametrize("jobs", [1, 64, None])
def test_a_run_has_one_thread_however_many_take_place_at_once_unless_told(here, jobs):
    def threads(**values) -> int:
        return make_plan(
            CompareConfig(**LARGE, **values), out=here / "out", jobs=jobs
        ).config.threads

    assert (threads(), threads(threads=2)) == (1, 2)


@pytest.mark.parametrize(
    ("cores", "seeds", "jobs"), [(3, 5, 3), (3, 2, 2), (1, 5, 1), (2000, 3000, 1024)]
)
def test_there_are_as_many_jobs_as_cores_but_no_more_than_runs(
    here, monkeypatch, cores, seeds, jobs
):
    monkeypatch.setattr("regrad_runner.comparing.plan.usable_cores", lambda: cores)
    made = make_plan(CompareConfig(**LARGE, seeds=seeds), out=here / "out", jobs=None)
    assert made.jobs == jobs
    assert ("at once" in made.in_words()) == (jobs > 1)


@pytest.mark.parametrize("where", ["on several processes", "on an accelerator"])
def test_there_is_one_job_unless_told(here, monkeypatch, where):
    made = make_plan(CompareConfig(**LARGE, seeds=5), out=here / "out", jobs=1)
    monkeypatch.setattr("regrad_runner.comparing.plan.usable_cores", lambda: 8)
    if where == "on an accelerator":
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    else:
        made = replace(made, processes=2)
    assert suitable_jobs(made) == 1


def test_a_container_or_the_environment_may_allow_fewer_cores_than_there_are(monkeypatch):
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    cores = usable_cores()
    assert cores >= 1
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert usable_cores() == 1


def test_jobs_must_be_some():
    with pytest.raises(ValueError, match="jobs must be from 1 to 1024, got 0"):
        make_plan(CompareConfig(), jobs=0)
