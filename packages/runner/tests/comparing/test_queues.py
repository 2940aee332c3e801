"""What is asked of SLURM and what its answers mean, by programs that are made up."""

from types import SimpleNamespace

import pytest
from regrad_runner.comparing import cluster_cells
from regrad_runner.comparing.cluster_cells import ClusterCells, on_cluster
from regrad_runner.comparing.plan import make_plan, open_folder
from regrad_runner.comparing.queues import last_line_of, not_in_queue, slurm_parameters
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import begin_run
from regrad_runner.settings.cluster import cluster_of
from regrad_runner.settings.config import CompareConfig


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Make up what squeue does, and nothing else that is in the PATH."""

    def does(body):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "squeue"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return does


def test_jobs_that_squeue_does_not_list_are_gone(squeue):
    squeue("echo 12_0; echo 12_3")
    assert not_in_queue(["12_0", "12_1", "12_3"]) == {"12_1"}
    squeue("exit 0")
    assert not_in_queue(["12_0", "13"]) == {"12_0", "13"}
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert not_in_queue(["12_0"]) == {"12_0"}


def test_a_squeue_that_does_not_answer_says_nothing_of_any_job(squeue, tmp_path, monkeypatch):
    squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert not_in_queue(["12_0"]) == set()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not_in_queue(["12_0"]) == set()


def test_what_submitit_is_asked_for():
    cluster = cluster_of("slurm", "partition=gpu,time=1-00,cpus_per_task=8,signal_delay_s=120")
    assert slurm_parameters(cluster) == {
        "job_name": "regrad",
        "time": 1440,
        "signal_delay_s": 120,
        "srun_args": ["--cpus-per-task=8"],
        "additional_parameters": {
            "partition": "gpu",
            "cpus_per_task": "8",
            "ntasks": 1,
            "requeue": True,
        },
    }


def test_the_last_line_of_a_log_is_its_last_that_says_something(tmp_path):
    log = tmp_path / "log"
    assert last_line_of(log) == ""
    log.write_bytes(b"first\nValueError: no \xff data\n\n  \n")
    assert last_line_of(log) == "ValueError: no � data"
    (tmp_path / "link").symlink_to(log)
    assert last_line_of(tmp_path / "link") == ""


class Queue:
    """A queue whose jobs end in the ways that a list says, one after the other."""

    name = "jobs"
    at_once = 2
    seconds = 0.0
    patience = 0.0

    def __init__(self, folder, endings):
        self.folder = folder
        self.endings = endings
        self.sizes = []
        self.cancelled = []

    def still_there(self, numbers):
        return set()

    def submit(self, work, tasks):
        self.sizes.append(len(tasks))
        return [self.job(task) for task in tasks]

    def job(self, task):
        number = sum(self.sizes[:-1]) + task.number
        paths = SimpleNamespace(
            stderr=self.folder / f"{number}.err", result_pickle=self.folder / f"{number}.pkl"
        )
        return SimpleNamespace(job_id=str(number), paths=paths, task=task)

    def over(self, jobs):
        for job in jobs:
            job.state = self.endings.pop(0)
            cell = job.task.cell
            if job.state == "COMPLETED":
                values = {"name": cell.name, "arm": cell.arm, "seed": cell.seed, "lr": job.task.lr}
                with begin_run(self.folder, values) as record:
                    record.end("diverged")
            if job.state == "RAISED":
                job.paths.result_pickle.touch()
                job.paths.stderr.write_text("ValueError: no data\n")
        return jobs

    def ending(self, job):
        return job.state

    def cancel(self, jobs):
        self.cancelled += [job.job_id for job in jobs]


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Return the runner of four cells of a comparison, and its queue."""

    def made(*endings):
        config = CompareConfig(
            corrections=(), train_size=100, batch_size=25, width=4, lr=(0.05,), seeds=4
        )
        plan = on_cluster(make_plan(config, out=tmp_path / "out"), cluster_of("local", None))
        open_folder(plan)
        queue = Queue(plan.path, list(endings))
        monkeypatch.setattr(cluster_cells, "queue_of", lambda *_, **__: queue)
        said = []
        display = SimpleNamespace(say=said.append, begin=lambda name, *, steps: None)
        return ClusterCells(plan, plan.cluster, display), plan, queue, said

    return made


def test_lost_jobs_are_repeated_and_those_that_would_fail_again_are_not(cells):
    endings = ["COMPLETED", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"]
    runner, plan, queue, said = cells(*endings)
    with runner:
        ended = list(runner.run_cells([(cell, 0.05) for cell in plan.cells]))
    assert {cell.seed for cell in ended} == {0, 1, 2, 3}
    assert queue.sizes == [2, 2, 1, 1]  # never more than two at once
    results = {result.seed: result.status for result in ResultsFolder(plan.path).results}
    assert results == {0: "diverged", 1: "failed", 2: "failed", 3: "failed"}
    assert [line.partition(";")[0] for line in said if "submitted again" in line] == [
        "baseline, seed 1: job 1 was lost (NODE_FAIL)",
        "baseline, seed 1: job 8 was lost (NODE_FAIL)",
    ]
    failed = " ".join(line for line in said if " failed: " in line)
    assert "seed 2 failed: its job was cancelled; its log is" in failed
    assert "seed 3 failed: its job ran out of memory; ask for more, such as --slurm mem" in failed
    assert "seed 1 failed: job 10 was lost (PREEMPTED)" in failed
    assert queue.cancelled == []


def test_a_job_that_raises_says_the_last_line_of_its_log(cells):
    runner, plan, _, said = cells("RAISED")
    with runner:
        list(runner.run_cells([(plan.cells[0], 0.05)]))
    assert said[0].startswith("baseline, seed 0 failed: job 0 failed: ValueError: no data; its log")


def test_an_error_cancels_what_is_under_way(cells):
    runner, plan, queue, _ = cells("COMPLETED")

    def stop():
        with runner:
            queue.over = lambda jobs: [] if len(jobs) < 2 else [jobs[0]]
            queue.ending = lambda job: "CANCELLED"
            for _ in runner.run_cells([(cell, 0.05) for cell in plan.cells[:2]]):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert queue.cancelled == ["1"]
