"""TensorBoard and Weights & Biases: what they hold of a run, each number once, and without a network."""

import importlib.util
import json
import struct
from dataclasses import replace

import pytest
from regrad_runner.cli.main import main
from regrad_runner.tracking import accelerate_trackers as module
from regrad_runner.tracking.accelerate_trackers import AccelerateStore
from regrad_runner.tracking.mlflow import MetricPoint
from regrad_runner.tracking.projector import Projection, Source

SMALL = ["--train-size", "100", "--batch-size", "25", "--width", "4", "--epochs", "2"]


def needs(library: str):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"needs {library}, of the extra of that name")


# wandb and tensorboard with newer Pythons and protobufs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def run(tracked_run, tmp_path):
    """A run at its place in an output folder."""
    folder = tmp_path / "out" / "runs" / "baseline" / "0"
    folder.mkdir(parents=True)
    points = [point for point in tracked_run.points if point.name == "loss"]
    return replace(tracked_run, folder=folder, points=points)


def events(folder):
    """What TensorBoard shows of a folder: its numbers by name, and its texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    tags = shown.Tags()
    numbers = {
        tag: [(event.step, round(event.value, 6), event.wall_time) for event in shown.Scalars(tag)]
        for tag in tags["scalars"]
    }
    return numbers, tags["tensors"]


@needs("tensorboard")
def test_tensorboard_holds_every_number_once_however_often_it_is_sent(run, tmp_path):
    out = tmp_path / "out"
    growing = replace(run, status="RUNNING", ended=None, points=run.points[:2])
    store = AccelerateStore("tensorboard", out)
    assert store.project(growing).points == 2
    assert not store.project(growing)
    assert store.project(run).points == 1  # and it has ended
    assert not store.project(run)
    another_process = AccelerateStore("tensorboard", out)
    assert not another_process.project(run)
    numbers, texts = events(out / "tensorboard" / "baseline" / "0")
    expected = [(point.step, round(point.value, 6), point.time / 1000) for point in run.points]
    assert numbers == {"loss": expected}
    assert texts == ["settings/text_summary"]


@needs("tensorboard")
def test_an_attempt_that_replaces_another_one_is_shown_alone(run, tmp_path):
    out = tmp_path / "out"
    AccelerateStore("tensorboard", out).project(run)
    again = replace(run, id=f"{8:032x}", points=[MetricPoint("loss", 9.0, 2_000_000_000_000, 1)])
    AccelerateStore("tensorboard", out).project(again)
    numbers, _ = events(out / "tensorboard" / "baseline" / "0")
    assert numbers == {"loss": [(1, 9.0, 2_000_000_000.0)]}


@needs("tensorboard")
def test_verdicts_that_more_seeds_changed_are_sent_again(run, tmp_path):
    out = tmp_path / "out"
    first = replace(run, folder=out, points=[MetricPoint("p/agc", 0.5, 1_700_000_000_000, 4)])
    more = replace(first, points=[MetricPoint("p/agc", 0.25, 1_700_000_100_000, 8)])
    store = AccelerateStore("tensorboard", out)
    assert store.project(first).points == 1
    assert store.project(more).points == 1
    numbers, _ = events(out / "tensorboard" / "comparison")
    assert [value for _, value, _ in numbers["p/agc"]] == [0.5, 0.25]


@needs("tensorboard")
def test_what_was_sent_that_cannot_be_read_is_sent_again(run, tmp_path):
    out = tmp_path / "out"
    AccelerateStore("tensorboard", out).project(run)
    (out / "tensorboard" / "baseline" / "0" / "regrad.json").write_text('{"points": "many"}')
    assert AccelerateStore("tensorboard", out).project(run).points == len(run.points)
    numbers, _ = events(out / "tensorboard" / "baseline" / "0")
    assert len(numbers["loss"]) == len(run.points)


@needs("tensorboard")
def test_a_link_in_the_place_of_its_folder_leads_nowhere(run, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "tensorboard").symlink_to(elsewhere)
    done = Projection(
        AccelerateStore("tensorboard", out), lambda: [Source(run.folder, "", lambda: run)]
    ).once()
    assert "must be a folder, got a link" in done.problems[0]
    assert not list(elsewhere.iterdir())


@needs("tensorboard")
def test_a_comparison_and_its_runs_are_in_tensorboard_and_sync_has_nothing_to_add(
    tmp_path, monkeypatch, capsys, without_page, without_timing
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text("corrections: []\nseeds: 2\nlr: [0.05]\n")
    words = ["compare", *SMALL, "--config", "few.yaml", "--tracker", "tensorboard"]
    assert main([*words, "--jobs", "1", "--out", "out"]) == 0
    shown = capsys.readouterr()
    assert "tensorboard --logdir out/tensorboard" in shown.out + shown.err
    for seed in ("0", "1"):
        numbers, _ = events(tmp_path / "out" / "tensorboard" / "baseline" / seed)
        lines = (tmp_path / "out/runs/baseline" / seed / "points.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        values = [line["values"]["value"] for line in kept if line["kind"] == "evaluation"]
        assert [value for _, value, _ in numbers["validation accuracy"]] == [
            pytest.approx(value, abs=1e-6) for value in values
        ]
        assert len(numbers["test accuracy"]) == 1
    assert not (tmp_path / "out" / "mlflow.db").exists()
    assert main(["sync", "out"]) == 0
    assert "everything in out is at out/tensorboard" in capsys.readouterr().out


@needs("tensorboard")
def test_a_tracker_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regrad_runner.tracking.projector.SECONDS_IN_VAIN", 0.0)

    def fail(*_):
        raise RuntimeError("no room for events")

    monkeypatch.setattr(AccelerateStore, "_tracker", fail)
    assert main(["train", *SMALL, "--tracker", "tensorboard", "--out", "out"]) == 0
    said = capsys.readouterr().err
    assert "tracking at out/tensorboard failed: no room for events; the runs continue" in said
    assert "regrad sync out completes it" in said


@needs("wandb")
@pytest.mark.timeout(300)
def test_weights_and_biases_gets_a_run_offline_with_its_settings_and_every_number(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    other = replace(run, id=f"{8:032x}", folder=run.folder.parent / "1", name="baseline, seed 1")
    store = AccelerateStore("wandb", out)
    growing = [replace(one, status="RUNNING", points=one.points[:1]) for one in (run, other)]
    assert [store.project(one).points for one in growing] == [1, 1]  # both at the same time
    assert [store.project(one).points for one in (run, other)] == [2, 2]
    assert not store.project(run)
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [run.id, other.id]
    history = sent_offline(next(folders[0].glob("*.wandb")))
    assert [(row["_step"], row["loss"]) for row in history] == [
        (point.step, point.value) for point in run.points
    ]
    note = json.loads((out / "wandb" / "sent" / "baseline" / "0" / "regrad.json").read_text())
    assert (note["points"], note["status"]) == (len(run.points), "FINISHED")


def sent_offline(file) -> list[dict]:
    """Return the rows of history in the file of an offline run: records as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, place, rows = file.read_bytes(), 7, []
    assert len(data) < 2**15  # one block, in which every record is whole
    while place < len(data):
        _, length, _ = struct.unpack("<IHB", data[place : place + 7])
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_is_one_line_that_says_what_to_install(
    tmp_path, monkeypatch, capsys, kind
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == kind else find(name)
    )
    monkeypatch.chdir(tmp_path)
    for command in ("compare", "train"):
        assert main([command, "--tracker", kind, "--out", "out"]) == 2
        assert capsys.readouterr().err == (
            f"regrad: --tracker {kind} must find the library {kind}, got none; "
            f"pip install regrad-runner[{kind}]\n"
        )
    assert not (tmp_path / "out").exists()


@needs("wandb")
def test_weights_and_biases_without_an_account_is_refused(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--tracker", "wandb", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "--tracker wandb must find an account, got none; run wandb login or set" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "none"])
def test_an_address_with_another_tracker_than_mlflow_is_refused(
    tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.chdir(tmp_path)
    words = ["--tracker", kind, "--tracking-uri", "http://127.0.0.1:5000"]
    assert main(["compare", *words, "--out", "out"]) == 2
    assert (
        f"--tracking-uri must be given with --tracker mlflow alone, got --tracker {kind}"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
