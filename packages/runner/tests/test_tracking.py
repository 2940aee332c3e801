import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from regrad.errors import RegradError, RegradWarning
from regrad_runner.tracking import METRICS_PER_CALL, MlflowTracker, Terminated, Tracker, open_tracker

DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory) -> Tracker:
    """One tracker for the module: a fresh schema takes seconds."""
    return open_tracker("mlflow", folder=tmp_path_factory.mktemp("tracked"))


@pytest.fixture(scope="module")
def client(tracker):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracker.uri)


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder whose database is not one."""
    (tmp_path / "mlflow.db").write_text("this is no database, but it is long enough to be read as one")
    return tmp_path


def kept(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "unsent" / "records.jsonl").read_text().splitlines()]


def script(folder: Path, body: str) -> list[str]:
    head = f"from pathlib import Path\nfrom regrad_runner.tracking import *\nfolder = Path({str(folder)!r})\n"
    return [sys.executable, "-c", head + body]


def test_a_run_arrives_with_its_numbers_settings_file_and_parent(tracker, client, tmp_path):
    (tmp_path / "receipt.json").write_text("{}")
    with tracker.start("digits", "comparison") as parent:
        with tracker.start("digits", "xgrad 0", {"lr": 0.05, "corrections": ["xgrad"]}, parent) as run:
            run.log(1, {"loss": 2.0})
            run.log(2, {"loss": 1.0, "xgrad/weights/cosine": 0.9})
            run.artifact(tmp_path / "receipt.json")
        assert client.get_run(run.id).info.status == "FINISHED"
        assert client.get_run(parent.id).info.status == "RUNNING"
    found = client.get_run(run.id)
    assert found.data.params == {"lr": "0.05", "corrections": "['xgrad']"}
    assert found.data.tags["mlflow.parentRunId"] == parent.id
    assert found.info.run_name == "xgrad 0"
    assert [(m.step, m.value) for m in client.get_metric_history(run.id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert found.data.metrics["xgrad/weights/cosine"] == 0.9
    assert [a.path for a in client.list_artifacts(run.id)] == ["receipt.json"]


def test_everything_lies_in_the_folder_whatever_the_working_directory_and_the_environment_say(
    tracker, client, tmp_path, monkeypatch
):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("artifact_location: nowhere\nexperiment_id: '0'\nname: old\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    before = sorted(tmp_path.rglob("*"))
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    with tracker.start("elsewhere", "run") as run:
        run.log(0, {"loss": 1.0})
        run.artifact(tmp_path / "mlruns" / "0" / "meta.yaml")
    assert client.get_run(run.id).info.artifact_uri.startswith((folder / "artifacts").as_uri())
    assert list((folder / "artifacts").rglob("meta.yaml"))
    assert not (folder / "unsent").exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_tensors_and_numpy_scalars_are_numbers(tracker, client):
    with tracker.start("kinds", "run") as run:
        run.log(3, {"tensor": torch.tensor(0.5), "half": torch.tensor([0.25], dtype=torch.bfloat16)})
        run.log(3, {"numpy": numpy.float32(0.125), "integer": numpy.int64(7), "flag": True})
    assert client.get_run(run.id).data.metrics == {
        "tensor": 0.5,
        "half": 0.25,
        "numpy": 0.125,
        "integer": 7.0,
        "flag": 1.0,
    }


def test_a_tensor_is_read_when_it_is_logged(tracker, client):
    loss = torch.tensor(1.0)
    with tracker.start("kinds", "run") as run:
        run.log(0, {"loss": loss})
        loss.zero_()
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}


def test_more_values_than_one_call_takes_all_arrive(tracker, client):
    steps = METRICS_PER_CALL + 7
    with tracker.start("many", "run", {f"option {i}": i for i in range(150)}) as run:
        run.log(0, {f"metric {i}": i for i in range(METRICS_PER_CALL * 2 + 1)})
        for step in range(steps):
            run.log(step, {"loss": step})
    assert [m.step for m in client.get_metric_history(run.id, "loss")] == list(range(steps))
    assert len(client.get_run(run.id).data.metrics) == METRICS_PER_CALL * 2 + 2
    assert len(client.get_run(run.id).data.params) == 150


def test_names_that_mlflow_refuses_are_made_fit(tracker, client):
    with tracker.start("names", "xgrad:horizon=2", {"xgrad:horizon": 2}) as run:
        run.log(0, {"xgrad+powergrad/cosine": 1.0})
    data = client.get_run(run.id).data
    assert data.metrics == {"xgrad_powergrad/cosine": 1.0}
    assert data.params == {"xgrad:horizon": "2"}


def test_a_value_that_is_no_number_is_left_out_with_a_warning(tracker, client):
    with tracker.start("kinds", "run") as run:
        with pytest.warns(RegradWarning, match=r"metric 'curve' must be one number, got tensor\(\[0., 0.\]\)"):
            run.log(0, {"curve": torch.zeros(2), "loss": 1.0})
        with pytest.warns(RegradWarning, match="artifact must be a file, got 'absent.png'"):
            run.artifact(Path("absent.png"))
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("lr must be positive"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Terminated(), "KILLED")],
)
def test_what_ends_a_run_decides_its_status_and_leaves_its_traceback(tracker, client, error, status):
    with (
        pytest.raises(type(error)),
        tracker.start("endings", "comparison") as parent,
        tracker.start("endings", "run", parent=parent) as run,
    ):
        run.log(0, {"loss": 1.0})
        raise error
    for one in (run, parent):
        assert client.get_run(one.id).info.status == status
        assert type(error).__name__ in client.get_run(one.id).data.tags["regrad.traceback"]
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}


def test_only_the_first_finish_counts_and_nothing_is_logged_after_it(tracker, client):
    with tracker.start("endings", "run") as run:
        run.finish("KILLED")
        with pytest.raises(RegradError, match="is finished; start another one before logging"):
            run.log(0, {"loss": 1.0})
    assert client.get_run(run.id).info.status == "KILLED"


def test_logging_does_not_wait_for_the_delivery(tracker, client, monkeypatch):
    open_gate = threading.Event()
    log_batch = tracker._client.log_batch

    def slow(*args, **kwargs):
        assert open_gate.wait(60)
        log_batch(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", slow)
    with tracker.start("slow", "run") as run:
        for step in range(METRICS_PER_CALL + 1):
            run.log(step, {"loss": 1.0})
        assert client.get_run(run.id).data.metrics == {}
        open_gate.set()
    assert len(client.get_metric_history(run.id, "loss")) == METRICS_PER_CALL + 1


def test_without_a_database_the_training_goes_on_and_everything_is_kept_in_order(broken, tmp_path_factory):
    figure = tmp_path_factory.mktemp("figures") / "curve.png"
    figure.write_bytes(b"picture")
    with pytest.warns(RegradWarning, match="failed: .*not a database; training goes on, the rest is kept in"):
        tracker = open_tracker("mlflow", folder=broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracker.start("digits", "comparison") as parent, tracker.start("digits", "run", {"lr": 1}, parent) as run:
            run.log(1, {"loss": 0.1})
            run.log(2, {"loss": float("inf")})
            run.artifact(figure)
            figure.unlink()
    assert run.id != parent.id
    records = [record for record in kept(broken) if record["run"] == run.id]
    assert [record["op"] for record in records] == ["start", "params", "artifact", "metrics", "finish"]
    start, params, artifact, metrics, finish = records
    assert (start["experiment"], start["name"]) == ("digits", "run")
    assert start["tags"] == {"mlflow.parentRunId": parent.id}
    assert params["values"] == [["lr", "1"]]
    assert (broken / "unsent" / artifact["path"]).read_bytes() == b"picture"
    assert [(name, value, step) for name, value, _, step in metrics["values"]] == [
        ("loss", 0.1, 1),
        ("loss", float("inf"), 2),
    ]
    assert finish["status"] == "FINISHED"


def test_what_a_lost_database_did_not_take_is_kept_and_nothing_is_kept_twice(tmp_path, client, tracker, monkeypatch):
    second = MlflowTracker(folder=tmp_path, uri=tracker.uri)
    log_batch, calls = second._client.log_batch, []

    def fails_from_the_second_call_on(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise ConnectionError("server went away")
        log_batch(*args, **kwargs)

    monkeypatch.setattr(second._client, "log_batch", fails_from_the_second_call_on)
    with pytest.warns(RegradWarning, match="server went away") as seen, second.start("lost", "run") as run:
        for step in range(METRICS_PER_CALL * 3 + 5):
            run.log(step, {"loss": step})
    assert len(seen) == 1
    assert len(calls) == 2
    delivered = [m.step for m in client.get_metric_history(run.id, "loss")]
    unsent = [value[3] for record in kept(tmp_path) if record["op"] == "metrics" for value in record["values"]]
    assert delivered + unsent == list(range(METRICS_PER_CALL * 3 + 5))
    assert kept(tmp_path)[-1]["op"] == "finish"
    assert client.get_run(run.id).info.status == "RUNNING"


def test_a_dead_server_costs_its_time_out_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = open_tracker("mlflow", folder=tmp_path, uri=DEAD_SERVER)
    with pytest.warns(RegradWarning, match=f"tracking at {DEAD_SERVER} failed") as seen:
        for name in ("first", "second"):
            with tracker.start("digits", name) as run:
                run.log(0, {"loss": 1.0})
    assert len(seen) == 1
    assert [r["name"] for r in kept(tmp_path) if r["op"] == "start"] == ["first", "second"]


def test_two_workers_that_start_at_once_on_a_fresh_file_both_succeed_and_say_nothing(tmp_path):
    body = """
import sys
tracker = open_tracker("mlflow", folder=folder)
with tracker.start("digits", sys.argv[1]) as run:
    run.log(0, {"loss": 1.0})
"""
    command = script(tmp_path / "out", body)
    workers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
        for name in ("first", "second")
    ]
    assert [(worker.communicate(timeout=240), worker.returncode) for worker in workers] == [((b"", b""), 0)] * 2
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
    runs = client.search_runs([experiment.experiment_id])
    assert {(r.info.run_name, r.info.status) for r in runs} == {("first", "FINISHED"), ("second", "FINISHED")}
    assert not (tmp_path / "out" / "unsent").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_is_told_to_end_marks_its_runs_killed(tracker, client):
    body = f"""
import signal, time

def end(number, frame):
    raise Terminated

signal.signal(signal.SIGTERM, end)
tracker = MlflowTracker(folder=folder, uri={tracker.uri!r})
with tracker.start("ended", "comparison") as parent, tracker.start("ended", "run", parent=parent) as run:
    run.log(7, {{"loss": 1.0}})
    print("training", flush=True)
    time.sleep(240)
"""
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    with subprocess.Popen(script(folder, body), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"training\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == Terminated().code == 143
    experiment = client.get_experiment_by_name("ended")
    runs = client.search_runs([experiment.experiment_id])
    assert {(r.info.run_name, r.info.status) for r in runs} == {("comparison", "KILLED"), ("run", "KILLED")}
    assert {"loss": 1.0} in [r.data.metrics for r in runs]


def test_the_tracker_that_does_nothing_imports_nothing(tmp_path):
    body = """
import sys
with open_tracker("none", folder=folder).start("digits", "run", {"lr": 1}) as run:
    run.log(0, {"loss": 1.0})
    run.artifact(Path(__file__) if "__file__" in globals() else Path(sys.executable))
print(sorted({"mlflow", "torch", "pandas", "sqlalchemy"} & set(sys.modules)), list(folder.iterdir()), bool(run.id))
"""
    assert subprocess.check_output(script(tmp_path, body), text=True) == "[] [] True\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "wandb"}, "tracker must be 'mlflow' or 'none', got 'wandb'"),
        ({"uri": "./mlruns"}, "tracking uri must be an absolute address, got './mlruns'; give http"),
        ({"uri": "file:///mlruns"}, "tracking uri must be an absolute address"),
        ({"uri": "sqlite:///here.db"}, "tracking uri must be an absolute address"),
    ],
)
def test_an_unknown_tracker_or_a_relative_address_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_tracker(**({"folder": tmp_path} | arguments))
    assert list(tmp_path.iterdir()) == []
