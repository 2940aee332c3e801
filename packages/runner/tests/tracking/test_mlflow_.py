import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from regrad.errors import RegradError, RegradWarning
from regrad_runner.signals import Terminated
from regrad_runner.tracking.delivery import METRICS_PER_CALL
from regrad_runner.tracking.mlflow_ import MlflowTracker, Tracker, open_tracker
from regrad_runner.tracking.spool import spools

DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory) -> Iterator[Tracker]:
    """One tracker for the module: a fresh schema takes seconds."""
    with open_tracker("mlflow", folder=tmp_path_factory.mktemp("tracked")) as tracker:
        tracker.start("first", "first").finish()
        assert tracker.flush(240)
        yield tracker


@pytest.fixture(scope="module")
def client(tracker):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracker.uri)


def everything(client, filter_string=""):
    return client.search_runs(
        [one.experiment_id for one in client.search_experiments()], filter_string
    )


@pytest.fixture
def found(tracker, client):
    """Return what finds MLflow's run of one of ours, once everything is delivered."""

    def find(run):
        assert tracker.flush(240)
        (one,) = everything(client, f"tags.`regrad.run` = '{run.id}'")
        return one

    return find


@pytest.fixture
def history(found, client):
    """Return what gives the steps and values of one metric."""
    return lambda run, name: [
        (m.step, m.value) for m in client.get_metric_history(found(run).info.run_id, name)
    ]


@pytest.fixture(autouse=True)
def short_end(monkeypatch):
    """Let a test that gives up do so at once."""
    monkeypatch.setattr("regrad_runner.tracking.mlflow_.SECONDS_IN_VAIN", 0.0)


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder in which there can be no database."""
    (tmp_path / "mlflow.db").mkdir()
    return tmp_path


def kept(folder: Path) -> list[dict]:
    (spool,) = spools(folder / "unsent")
    return [json.loads(line) for line in (spool / "records.jsonl").read_text().splitlines()]


def script(folder: Path, body: str) -> list[str]:
    head = f"from pathlib import Path\nfrom regrad_runner.tracking.mlflow_ import *\nfolder = Path({str(folder)!r})\n"
    return [sys.executable, "-c", head + body]


def test_a_run_arrives_with_its_numbers_settings_file_and_parent(
    tracker, client, found, history, tmp_path
):
    (tmp_path / "receipt.json").write_text("{}")
    with tracker.start("digits", "comparison") as parent:
        with tracker.start(
            "digits", "xgrad 0", {"lr": 0.05, "corrections": ["xgrad"]}, parent
        ) as run:
            run.log(1, {"loss": 2.0})
            run.log(2, {"loss": 1.0, "xgrad/weights/cosine": 0.9})
            run.artifact(tmp_path / "receipt.json")
        assert found(run).info.status == "FINISHED"
        assert found(parent).info.status == "RUNNING"
    arrived = found(run)
    assert arrived.data.params == {"lr": "0.05", "corrections": "['xgrad']"}
    assert arrived.data.tags["mlflow.parentRunId"] == found(parent).info.run_id
    assert arrived.info.run_name == "xgrad 0"
    assert history(run, "loss") == [(1, 2.0), (2, 1.0)]
    assert arrived.data.metrics["xgrad/weights/cosine"] == 0.9
    assert [a.path for a in client.list_artifacts(arrived.info.run_id)] == ["receipt.json"]


def test_everything_lies_in_the_folder_whatever_the_working_directory_and_the_environment_say(
    tracker, found, tmp_path, monkeypatch
):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text(
        "artifact_location: nowhere\nexperiment_id: '0'\nname: old\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD_SERVER)
    before = sorted(tmp_path.rglob("*"))
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    with tracker.start("elsewhere", "run") as run:
        run.log(0, {"loss": 1.0})
        run.artifact(tmp_path / "mlruns" / "0" / "meta.yaml")
    assert found(run).info.artifact_uri.startswith((folder / "artifacts").as_uri())
    assert list((folder / "artifacts").rglob("meta.yaml"))
    assert sorted(tmp_path.rglob("*")) == before


def test_tensors_and_numpy_scalars_are_numbers(tracker, found):
    with tracker.start("kinds", "run") as run:
        run.log(
            3, {"tensor": torch.tensor(0.5), "half": torch.tensor([0.25], dtype=torch.bfloat16)}
        )
        run.log(3, {"numpy": numpy.float32(0.125), "integer": numpy.int64(7), "flag": True})
    assert found(run).data.metrics == {
        "tensor": 0.5,
        "half": 0.25,
        "numpy": 0.125,
        "integer": 7.0,
        "flag": 1.0,
    }


def test_a_tensor_is_read_when_it_is_logged(tracker, found):
    loss = torch.tensor(1.0)
    with tracker.start("kinds", "run") as run:
        run.log(0, {"loss": loss})
        loss.zero_()
    assert found(run).data.metrics == {"loss": 1.0}


def test_more_values_than_one_call_takes_all_arrive(tracker, found, history):
    steps = METRICS_PER_CALL + 7
    with tracker.start("many", "run", {f"option {i}": i for i in range(150)}) as run:
        run.log(0, {f"metric {i}": i for i in range(METRICS_PER_CALL * 2 + 1)})
        for step in range(steps):
            run.log(step, {"loss": step})
    assert [step for step, _ in history(run, "loss")] == list(range(steps))
    assert len(found(run).data.metrics) == METRICS_PER_CALL * 2 + 2
    assert len(found(run).data.params) == 150


def test_names_that_mlflow_refuses_are_made_fit(tracker, found):
    with tracker.start("names", "xgrad:horizon=2", {"xgrad:horizon": 2}) as run:
        run.log(0, {"xgrad+powergrad/cosine": 1.0})
    data = found(run).data
    assert data.metrics == {"xgrad_powergrad/cosine": 1.0}
    assert data.params == {"xgrad:horizon": "2"}


def test_a_value_that_is_no_number_is_left_out_with_a_warning(tracker, found):
    with tracker.start("kinds", "run") as run:
        with pytest.warns(
            RegradWarning, match=r"metric 'curve' must be one number, got tensor\(\[0., 0.\]\)"
        ):
            run.log(0, {"curve": torch.zeros(2), "loss": 1.0})
        with pytest.warns(RegradWarning, match="artifact must be a file, got 'absent.png'"):
            run.artifact(Path("absent.png"))
    assert found(run).data.metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("lr must be positive"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated(), "KILLED"),
    ],
)
def test_what_ends_a_run_decides_its_status_and_leaves_its_traceback(
    tracker, client, found, error, status
):
    with (
        pytest.raises(type(error)),
        tracker.start("endings", "comparison") as parent,
        tracker.start("endings", "run", parent=parent) as run,
    ):
        run.log(0, {"loss": 1.0})
        raise error
    for one in map(found, (run, parent)):
        assert one.info.status == status
        assert type(error).__name__ in one.data.tags["regrad.traceback"]
        files = [a.path for a in client.list_artifacts(one.info.run_id)]
        assert files == (["traceback.txt"] if status == "FAILED" else [])
    assert found(run).data.metrics == {"loss": 1.0}


def test_the_whole_traceback_is_a_file_of_the_run(tracker, client, found, tmp_path):
    with pytest.raises(ValueError, match="xxx"), tracker.start("endings", "run") as run:
        raise ValueError("x" * 6000)
    path = client.download_artifacts(found(run).info.run_id, "traceback.txt", str(tmp_path))
    text = Path(path).read_text()
    assert text.startswith("Traceback (most recent call last)")
    assert "x" * 6000 in text
    assert len(found(run).data.tags["regrad.traceback"]) == 5000


def test_only_the_first_finish_counts_and_nothing_is_logged_after_it(tracker, found):
    with tracker.start("endings", "run") as run:
        run.finish("KILLED")
        with pytest.raises(RegradError, match="is finished; start another one before logging"):
            run.log(0, {"loss": 1.0})
    assert found(run).info.status == "KILLED"


def test_nothing_in_the_training_waits_for_the_delivery(tracker, client, history, monkeypatch):
    open_gate = threading.Event()
    search = tracker._sender._delivery._client.search_runs

    def slow(*args, **kwargs):
        assert open_gate.wait(240)
        return search(*args, **kwargs)

    monkeypatch.setattr(tracker._sender._delivery._client, "search_runs", slow)
    with tracker.start("slow", "slow", {"lr": 1}) as run:
        for step in range(METRICS_PER_CALL + 1):
            run.log(step, {"loss": 1.0})
    assert "slow" not in [one.info.run_name for one in everything(client)]
    open_gate.set()
    assert len(history(run, "loss")) == METRICS_PER_CALL + 1


def test_without_a_database_the_training_goes_on_and_everything_is_kept_in_order(
    broken, tmp_path_factory
):
    figure = tmp_path_factory.mktemp("figures") / "curve.png"
    figure.write_bytes(b"picture")
    tracker = open_tracker("mlflow", folder=broken)
    message = "failed: .*must be a file, got a link or a folder.*; training goes on, what is not delivered is kept in"
    with pytest.warns(
        RegradWarning, match=message
    ):  # at the first call after the thread has met it
        parent = tracker.start("digits", "comparison")
        assert not tracker.flush(240)
        parent.log(0, {"loss": 0.2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with parent, tracker.start("digits", "run", {"lr": 1}, parent) as run:
            run.log(1, {"loss": 0.1})
            run.log(2, {"loss": float("inf")})
            run.artifact(figure)
            figure.unlink()
    with pytest.warns(
        RegradWarning, match=rf"^9 tracking records wait in .*; regrad sync {broken} delivers them"
    ):
        tracker.close()
    records = [record for record in kept(broken) if record["run"] == run.id]
    assert [record["op"] for record in records] == [
        "start",
        "params",
        "metrics",
        "metrics",
        "artifact",
        "finish",
    ]
    start, params, first, second, artifact, finish = records
    assert (start["experiment"], start["name"], start["parent"]) == ("digits", "run", parent.id)
    assert params["values"] == [["lr", "1"]]
    assert (spools(broken / "unsent")[0] / artifact["path"]).read_bytes() == b"picture"
    assert [(name, value, step) for name, value, _, step in first["values"] + second["values"]] == [
        ("loss", 0.1, 1),
        ("loss", float("inf"), 2),
    ]
    assert finish["status"] == "FINISHED"


def test_what_a_lost_database_did_not_take_arrives_by_itself_when_it_is_back(
    tmp_path, tracker, history, monkeypatch
):
    second = MlflowTracker(folder=tmp_path, uri=tracker.uri)
    monkeypatch.setattr("regrad_runner.tracking.delivery.FIRST_PAUSE", 0.01)
    assert second.flush(240)
    with second.start("lost", "run") as run:
        assert second.flush(240)
        log_batch, calls = second._sender._delivery._client.log_batch, []

        def fails_twice(*args, **kwargs):
            calls.append(args)
            if len(calls) in (2, 3):
                raise ConnectionError("server went away")
            log_batch(*args, **kwargs)

        monkeypatch.setattr(second._sender._delivery._client, "log_batch", fails_twice)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for step in range(METRICS_PER_CALL * 3 + 5):
                run.log(step, {"loss": step})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr("regrad_runner.tracking.mlflow_.SECONDS_IN_VAIN", 10.0)
        second.close(240)
    assert [str(one.message)[:17] for one in seen] in ([], ["tracking at sqlit"])
    assert len(calls) >= 6
    assert [step for step, _ in history(run, "loss")] == list(range(METRICS_PER_CALL * 3 + 5))
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_costs_the_training_nothing_and_the_end_little(tmp_path):
    tracker = open_tracker("mlflow", folder=tmp_path, uri=DEAD_SERVER)
    runs = [tracker.start("digits", "first")]
    assert not tracker.flush(240)
    with pytest.warns(RegradWarning, match=f"tracking at {DEAD_SERVER} failed") as seen:
        runs.append(tracker.start("digits", "second"))
        for run in runs:
            run.log(0, {"loss": 1.0})
            run.finish()
    assert len(seen) == 1
    with pytest.warns(RegradWarning, match="6 tracking records wait in"):
        tracker.close()
    assert [r["name"] for r in kept(tmp_path) if r["op"] == "start"] == ["first", "second"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("a disk of its own cannot be mounted; this takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk):
    with (
        (disk / "fill").open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left on device"),
    ):
        for _ in range(1024):
            file.write(bytes(1024))


def test_on_a_full_disk_everything_still_arrives_after_one_warning(
    small_disk, tracker, client, history, tmp_path
):
    (tmp_path / "receipt.json").write_text("{}")
    second = MlflowTracker(folder=small_disk, uri=tracker.uri)
    with second.start("full", "run") as run:
        run.log(0, {"loss": 0.0})
        fill(small_disk)
        with pytest.warns(
            RegradWarning,
            match="tracking cannot write to .*No space left on device; training goes on",
        ):
            for step in range(1, 500):
                run.log(step, {"loss": step})
        run.artifact(tmp_path / "receipt.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.close(240)
    assert history(run, "loss") == [(step, float(step)) for step in range(500)]
    assert not (small_disk / "unsent").exists()


@pytest.mark.filterwarnings("ignore:tracking (at|cannot):regrad.errors.RegradWarning")
def test_a_full_disk_and_no_server_say_what_is_lost_and_what_was_there_is_kept(small_disk):
    second = MlflowTracker(folder=small_disk, uri=DEAD_SERVER)
    with second.start("full", "run") as run:
        run.log(0, {"loss": 0.0})
        fill(small_disk)
        for step in range(1, 500):
            run.log(step, {"loss": step})
    with pytest.warns(
        RegradWarning,
        match="502 tracking records could neither be sent nor written to .* lost: .*space",
    ):
        second.close()
    steps = [record["values"][0][3] for record in kept(small_disk) if record["op"] == "metrics"]
    assert steps == list(range(len(steps)))
    assert 0 < len(steps) < 500


def test_two_workers_that_start_at_once_on_a_fresh_file_both_succeed_and_say_nothing(tmp_path):
    body = """
import sys
with open_tracker("mlflow", folder=folder) as tracker, tracker.start("digits", sys.argv[1]) as run:
    run.log(0, {"loss": 1.0})
"""
    command = script(tmp_path / "out", body)
    workers = [
        subprocess.Popen(
            [*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
        )
        for name in ("first", "second")
    ]
    assert [(worker.communicate(timeout=240), worker.returncode) for worker in workers] == [
        ((b"", b""), 0)
    ] * 2
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
    runs = client.search_runs([experiment.experiment_id])
    assert {(r.info.run_name, r.info.status) for r in runs} == {
        ("first", "FINISHED"),
        ("second", "FINISHED"),
    }
    assert not (tmp_path / "out" / "unsent").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_is_told_to_end_marks_its_runs_killed(tracker, client):
    body = f"""
import signal, time

def end(number, frame):
    raise Terminated

signal.signal(signal.SIGTERM, end)
tracker = MlflowTracker(folder=folder, uri={tracker.uri!r})
with tracker, tracker.start("ended", "comparison") as parent, tracker.start("ended", "run", parent=parent) as run:
    run.log(7, {{"loss": 1.0}})
    print("training", flush=True)
    time.sleep(240)
"""
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    with subprocess.Popen(script(folder, body), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"training\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=240) == Terminated().code == 143
    experiment = client.get_experiment_by_name("ended")
    runs = client.search_runs([experiment.experiment_id])
    assert {(r.info.run_name, r.info.status) for r in runs} == {
        ("comparison", "KILLED"),
        ("run", "KILLED"),
    }
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
        (
            {"uri": "./mlruns"},
            "tracking uri must be an absolute address, got './mlruns'; give http",
        ),
        ({"uri": "file:///mlruns"}, "tracking uri must be an absolute address"),
        ({"uri": "sqlite:///here.db"}, "tracking uri must be an absolute address"),
    ],
)
def test_an_unknown_tracker_or_a_relative_address_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_tracker(**({"folder": tmp_path} | arguments))
    assert list(tmp_path.iterdir()) == []
