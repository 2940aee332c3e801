"""What a store holds after a projection, whatever happened to the one before."""

import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import replace

import pytest
from regrad_runner.tracking import mlflow as module
from regrad_runner.tracking.mlflow import MetricPoint, TrackedRun, project
from regrad_runner.tracking.stores import Store

pytestmark = pytest.mark.usefixtures("ready_schema")
WHEN = 1_700_000_000_000


class Crash(BaseException):
    """A process that ends in the middle: nothing handles it."""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


@pytest.fixture
def client(store):
    return store.client()


def test_a_run_arrives_once_and_a_second_projection_sends_nothing(
    store, client, tracked_run, held, wanted
):
    sent = project(store, tracked_run)
    assert (sent.points, sent.files) == (8, 1)
    for _ in range(2):
        assert held(client, tracked_run) == wanted
        assert not project(store, tracked_run)


CALLS = [
    "create_experiment",
    "create_run",
    "log_batch",
    "set_tag",
    "log_artifact",
    "set_terminated",
    "search_runs",
    "list_artifacts",
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_crash_or_a_lost_answer_at_any_call_changes_nothing_in_the_end(
    store, client, tracked_run, held, wanted, monkeypatch, call, after
):
    for error in (Crash, ConnectionError):
        with monkeypatch.context() as patch:
            original = getattr(client, call)

            def broken(*args, error=error, original=original, **options):
                if after:
                    original(*args, **options)
                raise error

            patch.setattr(client, call, broken)
            with suppress(Crash, ConnectionError):
                project(store, tracked_run)
    project(store, tracked_run)
    assert held(client, tracked_run) == wanted
    assert not project(store, tracked_run)


def test_a_run_that_a_slow_server_made_twice_is_there_once(
    store, client, tracked_run, held, wanted
):
    project(store, tracked_run)
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    client.create_run(experiment.experiment_id, WHEN + 1, {"regrad.run": tracked_run.id}, "twin")
    assert project(store, tracked_run).others == 1
    assert held(client, tracked_run) == wanted


def test_a_server_that_says_yes_and_keeps_nothing_gets_it_the_next_time(
    store, client, tracked_run, held, wanted, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", lambda *args, **options: None)
        patch.setattr(client, "log_artifact", lambda *args, **options: None)
        for _ in range(2):
            assert project(store, tracked_run).points == 8
    sent = project(store, tracked_run)
    assert (sent.points, sent.files) == (8, 1)
    assert held(client, tracked_run) == wanted


def test_an_experiment_or_a_run_that_was_deleted_is_restored(
    store, client, tracked_run, held, wanted
):
    project(store, tracked_run)
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    client.delete_experiment(experiment.experiment_id)
    project(store, tracked_run)
    assert held(client, tracked_run) == wanted
    (run,) = client.search_runs([experiment.experiment_id])
    client.delete_run(run.info.run_id)
    project(store, tracked_run)
    assert held(client, tracked_run) == wanted


def test_a_run_or_an_experiment_that_was_deleted_for_good_is_made_anew(
    store, client, tracked_run, held, wanted
):
    project(store, tracked_run)
    with closing(sqlite3.connect(store.file)) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
        database.commit()
    project(store, tracked_run)
    assert held(client, tracked_run) == wanted


@pytest.mark.parametrize("moved", [False, True])
def test_a_store_that_is_replaced_under_way_gets_everything(
    store, client, tracked_run, held, wanted, schema, moved
):
    project(store, tracked_run)
    if moved:
        store.file.rename(store.file.with_name("old.db"))
    else:
        store.file.unlink()
    shutil.copyfile(schema, store.file.with_name("new.db"))
    store.file.with_name("new.db").rename(store.file)
    project(store, tracked_run)
    assert held(store.client(), tracked_run) == wanted


def test_a_parameter_that_changed_is_said_in_a_tag(store, client, tracked_run):
    project(store, tracked_run)
    later = replace(tracked_run, parameters={"lr": 0.2, "momentum": 0.9}, tags={"seeds": "5"})
    project(store, later)
    assert not project(store, later)
    (run,) = client.search_runs(
        [one.experiment_id for one in client.search_experiments()], "attributes.status = 'FINISHED'"
    )
    assert run.data.params == {"lr": "0.1", "corrections": "xgrad", "momentum": "0.9"}
    assert (run.data.tags["regrad.changed.lr"], run.data.tags["seeds"]) == ("0.2", "5")


def test_a_run_is_shown_under_its_parent_once_that_is_there(store, client, tracked_run):
    child = replace(tracked_run, id=f"{8:032x}", parent=tracked_run.id)
    project(store, child)
    project(store, tracked_run)
    assert project(store, child).others == 1
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    numbers = {run.data.tags["regrad.run"]: run for run in runs}
    parent = numbers[child.id].data.tags["mlflow.parentRunId"]
    assert parent == numbers[tracked_run.id].info.run_id


def test_a_run_that_goes_on_runs_again_and_ends_again(store, client, tracked_run, held):
    project(store, tracked_run)
    for status, ended in (("RUNNING", None), ("KILLED", WHEN + 50)):
        run = replace(tracked_run, status=status, ended=ended)
        project(store, run)
        assert held(client, run)["status"][0] == status
        assert not project(store, run)


def test_an_attempt_that_was_replaced_no_longer_looks_open(store, client, tracked_run, held):
    open_run = replace(tracked_run, status="RUNNING", ended=None)
    project(store, open_run)
    again = replace(tracked_run, id=f"{8:032x}", earlier=[tracked_run.id])
    project(store, again)
    assert held(client, open_run)["status"][0] == "KILLED"
    assert held(client, again)["status"][0] == "FINISHED"


def test_a_file_that_changed_is_sent_again(store, client, tracked_run, tmp_path):
    project(store, tracked_run)
    (tracked_run.folder / "receipt.json").write_text("[]")
    assert project(store, tracked_run).files == 1
    (kept,) = (tmp_path / "out" / "artifacts").rglob("receipt.json")
    assert kept.read_text() == "[]"


def to_a_file(path, victim):
    path.symlink_to(victim / "thesis.txt")


def folder(path, victim):
    path.mkdir()


def pipe(path, victim):
    os.mkfifo(path)


def huge(path, victim):
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("instead", [to_a_file, folder, huge, pipe])
def test_of_another_thing_in_the_place_of_a_file_nothing_is_sent(
    store, tracked_run, tmp_path, instead
):
    if instead is pipe and not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes here")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    (tracked_run.folder / "receipt.json").unlink()
    instead(tracked_run.folder / "receipt.json", victim)
    assert project(store, tracked_run).files == 0
    assert (victim / "thesis.txt").read_text() == "mine"


def test_of_a_folder_of_figures_that_is_a_link_nothing_is_sent(store, tracked_run, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.svg").write_text("mine")
    (tracked_run.folder / "figures").symlink_to(tmp_path / "victim")
    run = replace(tracked_run, files=("figures/thesis.svg",))
    assert project(store, run).files == 0


@pytest.mark.parametrize("place", ["victim", "artifacts/../../victim", "link", "file"])
def test_a_database_that_has_files_written_elsewhere_is_not_obeyed(
    store, client, tracked_run, tmp_path, place
):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    project(store, replace(tracked_run, files=()))
    with closing(sqlite3.connect(store.file)) as database:
        (number,) = database.execute("SELECT run_uuid FROM runs").fetchone()
        own = out / "artifacts" / number / "artifacts"
        uris = {"link": own.as_uri(), "file": own.as_uri()}
        base = tmp_path if place == "victim" else out
        uri = uris.get(place, f"{base.as_uri()}/{place}")
        database.execute("UPDATE runs SET artifact_uri = ?", (uri,))
        database.commit()
    if place == "link":
        own.parent.mkdir(parents=True)
        own.symlink_to(victim)
    if place == "file":
        own.mkdir(parents=True)
        (own / "receipt.json").symlink_to(victim / "thesis.txt")
    for _ in range(2):
        assert project(store, tracked_run).files == 0
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]
    assert (victim / "thesis.txt").read_text() == "mine"
    (note,) = store.notes
    assert "files of runs must be kept in" in note


def test_an_id_that_is_none_of_ours_is_not_searched_for(store, tracked_run):
    with pytest.raises(ValueError, match="id of a run must be 32 hexadecimal digits"):
        project(store, replace(tracked_run, id="7' OR '1' = '1"))


def test_everything_lies_in_the_folder_whatever_the_working_directory_and_the_environment_say(
    tracked_run, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mlruns" / "0").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = sorted(elsewhere.rglob("*"))
    assert project(Store(tmp_path / "out"), tracked_run).files == 1
    assert sorted(elsewhere.rglob("*")) == before
    assert list((tmp_path / "out" / "artifacts").rglob("receipt.json"))


def test_more_than_one_call_takes_arrives_and_is_compared_in_time(store, client, tmp_path):
    points = [
        MetricPoint(f"measure {k}", step / (k + 1), WHEN + step, step)
        for step in range(1000)
        for k in range(3)
    ]
    run = TrackedRun(
        id=f"{7:032x}",
        experiment="many",
        name="run",
        status="RUNNING",
        started=WHEN,
        parameters={f"option {i}": i for i in range(module.PARAMETERS_PER_CALL + 50)},
        points=points,
        folder=tmp_path,
    )
    assert project(store, run).points == 3000
    begun = time.perf_counter()
    assert not project(store, run)
    assert (
        time.perf_counter() - begun < 30
    )  # a fraction of a second on a machine with nothing else to do
    (there,) = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert len(there.data.params) == module.PARAMETERS_PER_CALL + 50
    assert len(client.get_metric_history(there.info.run_id, "measure 1")) == 1000
