"""The thread: what it does while runs go on, what it says, and how long its end takes."""

import threading
import time
from dataclasses import replace

import pytest
from regrad_runner.tracking import projector as module
from regrad_runner.tracking.projector import Projection, Projector, Source
from regrad_runner.tracking.stores import Store

pytestmark = pytest.mark.usefixtures("ready_schema")
DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def quick(monkeypatch):
    """Let rounds follow each other at once, and the end give up soon."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_ROUNDS", 0.01)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "SECONDS_IN_VAIN", 0.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


class Runs:
    """What there is to show, which may change."""

    def __init__(self, *runs):
        self.runs = list(runs)
        self.read = 0

    def __call__(self):
        return [Source(run.id, str(run), lambda run=run: self.give(run)) for run in self.runs]

    def give(self, run):
        self.read += 1
        return run


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def test_a_run_is_shown_while_it_grows_and_whole_at_the_end(
    store, tracked_run, held, wanted, quick
):
    growing = replace(tracked_run, status="RUNNING", ended=None, points=tracked_run.points[:1])
    runs, said = Runs(growing), []
    projector = Projector(store, runs, say=said.append)
    until(lambda: runs.read >= 2)
    for count in (2, 3, 4):
        runs.runs = [replace(growing, points=tracked_run.points[:count])]
        time.sleep(0.02)
    runs.runs = [tracked_run]
    assert projector.close(240)
    assert held(store.client(), tracked_run) == wanted
    assert said == []


def test_what_is_whole_is_not_looked_at_again_until_it_changes(store, tracked_run):
    runs = Runs(tracked_run)
    projection = Projection(store, runs)
    assert projection.until_complete().sent.points == 8
    read = runs.read
    assert not projection.once().sent
    assert runs.read == read
    runs.runs = [replace(tracked_run, status="KILLED")]
    assert projection.once().sent.others == 1


def test_nobody_waits_for_the_store_and_the_end_not_long(store, tracked_run, monkeypatch, quick):
    gate, asked = threading.Event(), threading.Event()

    def slow(*args):
        asked.set()
        gate.wait(240)
        raise ConnectionError

    monkeypatch.setattr(module, "project", slow)
    begun = time.perf_counter()
    projector = Projector(store, Runs(tracked_run), say=lambda text: None)
    assert time.perf_counter() - begun < 5
    assert asked.wait(240)
    begun = time.perf_counter()
    assert not projector.close(0.2)
    assert time.perf_counter() - begun < 5
    assert projector.problem == "it took more than 0 seconds"
    gate.set()


def test_a_failure_is_said_once_and_tried_again(
    store, tracked_run, held, wanted, monkeypatch, quick
):
    said, failures, project = [], [], module.project

    def fails(*args):
        if len(failures) < 3:
            failures.append(args)
            raise ConnectionError("the server went away: http://me:s3kret-w0rd@host")
        return project(*args)

    monkeypatch.setattr(module, "project", fails)
    projector = Projector(store, Runs(tracked_run), say=said.append)
    until(lambda: len(failures) == 3)
    assert projector.close(240)
    (line,) = said
    assert line.startswith(f"tracking at {store.shown} failed: the server went away: http://***@")
    assert held(store.client(), tracked_run) == wanted


def test_a_dead_server_costs_nothing_and_the_end_little(tracked_run, tmp_path, quick):
    said = []
    projector = Projector(Store(tmp_path, DEAD_SERVER), Runs(tracked_run), say=said.append)
    until(lambda: said)
    begun = time.perf_counter()
    assert not projector.close()
    assert time.perf_counter() - begun < 60
    assert f"tracking at {DEAD_SERVER} failed" in said[0]
    assert len(said) == 1
    assert "127.0.0.1" in projector.problem


def test_a_store_that_says_yes_and_keeps_nothing_is_not_complete(store, tracked_run, monkeypatch):
    client = store.client()
    monkeypatch.setattr(client, "log_batch", lambda *args, **options: None)
    done = Projection(store, Runs(tracked_run)).until_complete()
    assert done.problems == [
        "it reports that it stores what it receives, but 1 runs are incomplete"
    ]


def test_a_damaged_run_keeps_no_other_from_being_shown(store, tracked_run, held, wanted):
    def damaged():
        raise ValueError("'run.json' must be the record of a run")

    def sources():
        return [Source("damaged", 0, damaged), Source("whole", 0, lambda: tracked_run)]

    done = Projection(store, sources).until_complete()
    assert done.problems == ["'run.json' must be the record of a run"]
    assert held(store.client(), tracked_run) == wanted


def test_a_run_that_the_store_refuses_keeps_no_other_from_being_shown(
    store, tracked_run, held, wanted, monkeypatch
):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    project = module.project

    def refuses(store, run):
        if run.id != tracked_run.id:
            raise MlflowException("no such value", INVALID_PARAMETER_VALUE)
        return project(store, run)

    monkeypatch.setattr(module, "project", refuses)
    runs = Runs(replace(tracked_run, id=f"{8:032x}"), tracked_run)
    done = Projection(store, runs).until_complete()
    assert done.problems == ["no such value"]
    assert held(store.client(), tracked_run) == wanted


def test_the_thread_outlives_what_goes_wrong_in_the_folder(store, tracked_run, quick):
    said = []

    def sources():
        if not said:
            raise PermissionError("the folder is gone")
        return Runs(tracked_run)()

    projector = Projector(store, sources, say=said.append)
    until(lambda: said)
    assert projector.close(240)
    assert "the folder is gone" in said[0]
