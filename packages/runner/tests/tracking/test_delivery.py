import json
import shutil
import threading

import pytest
from regrad_runner.tracking.delivery import Delivery
from regrad_runner.tracking.spool import Spool, new_spool, take_spool
from regrad_runner.tracking.sync import sync

WHEN = 1_700_000_000_000


class Crash(BaseException):
    """A process that ends in the middle: nothing handles it."""


@pytest.fixture(scope="module")
def database(tmp_path_factory, schema):
    """A folder with a database: a fresh schema takes seconds."""
    folder = tmp_path_factory.mktemp("database")
    shutil.copyfile(schema, folder / "mlflow.db")
    (folder / "config.yaml").write_text("tracker: mlflow\n")
    Delivery(folder, None).connect()
    return folder


@pytest.fixture
def delivery(database):
    return Delivery(database, None)


@pytest.fixture
def client(delivery):
    return delivery.connect()


@pytest.fixture
def named(client):
    """Return what finds the runs of a name."""

    def find(name):
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        return client.search_runs(everywhere, f"attributes.run_name = '{name}'")

    return find


def records(run, *, file):
    """Return all there is in a run, among it values that compare badly: infinite, no number, the same twice."""
    values = [["loss", float(step), WHEN + step, step] for step in range(3)]
    odd = [
        ["odd", float("nan"), WHEN, 0],
        ["odd", float("inf"), WHEN, 1],
        ["odd", 1.0, WHEN, 2],
        ["odd", 1.0, WHEN, 2],
    ]
    return [
        {
            "op": "start",
            "run": run,
            "experiment": "digits",
            "name": run,
            "parent": "",
            "time": WHEN,
        },
        {"op": "params", "run": run, "values": [["lr", "0.1"]]},
        {"op": "metrics", "run": run, "time": WHEN, "values": values},
        {"op": "metrics", "run": run, "time": WHEN, "values": odd},
        {"op": "artifact", "run": run, "path": file},
        {"op": "text", "run": run, "name": "traceback.txt", "text": "Traceback"},
        {"op": "finish", "run": run, "status": "FINISHED", "time": WHEN + 9},
    ]


def waiting(database, run):
    """Return a spool with all there is in a run."""
    (database / "receipt.json").write_text("{}")
    spool = new_spool(database / "unsent")
    for record in records(run, file=spool.keep_file(database / "receipt.json")):
        spool.append(record)
    return spool


def check(client, named, name):
    """Check that everything of `records` is there once."""
    (run,) = named(name)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (s, float(s), WHEN + s) for s in range(3)
    ]
    odd = sorted((m.step, str(m.value)) for m in client.get_metric_history(run.info.run_id, "odd"))
    assert odd == [(0, "nan"), (1, "1.7976931348623157e+308"), (2, "1.0")]
    assert run.data.params == {"lr": "0.1"}
    assert sorted(a.path for a in client.list_artifacts(run.info.run_id)) == [
        "receipt.json",
        "traceback.txt",
    ]
    assert (run.info.status, run.info.end_time) == ("FINISHED", WHEN + 9)


def test_the_same_number_sent_twice_is_one_point(delivery, client, named, database):
    spool = waiting(database, "twice")
    delivery.send(spool)
    run = spool.sent.runs["twice"][1]
    for _ in range(2):
        delivery._deliver(spool, records("twice", file="")[2:4])
    assert len(client.get_metric_history(run, "loss")) == 3
    spool.leave()
    check(client, named, "twice")


@pytest.mark.parametrize("noted", range(6))
def test_a_crash_between_sending_and_noting_sends_nothing_twice(
    delivery, client, named, database, monkeypatch, noted
):
    name = f"crash {noted}"
    spool = waiting(database, name)
    count, note_sent = iter(range(100)), Spool.note_sent

    def crashing(self, lines):
        if next(count) == noted:
            raise Crash
        note_sent(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "note_sent", crashing)
        with pytest.raises(Crash):
            delivery.send(spool)
    spool._file_lock.release()  # as the system does for a process that is gone
    done = sync(database)
    assert (sum(done.delivered.values()), done.killed, done.waiting) == (
        7 - noted - (noted > 2),
        0,
        0,
    )
    check(client, named, name)
    assert not (database / "unsent").exists()


def test_a_run_whose_answer_was_lost_is_not_made_again(
    delivery, client, named, database, monkeypatch
):
    spool, create_run = waiting(database, "lost answer"), client.create_run

    def unheard(*args):
        create_run(*args)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_run", unheard)
        with pytest.raises(ConnectionError):
            delivery.send(spool)
    delivery.send(spool)
    spool.leave()
    check(client, named, "lost answer")


def test_a_run_that_a_slow_server_made_after_all_is_removed(
    delivery, client, named, database, monkeypatch
):
    spool, create_run, late = waiting(database, "late"), client.create_run, []

    def slow(*args):
        late.append(args)
        raise TimeoutError("no answer yet")

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_run", slow)
        with pytest.raises(TimeoutError):
            delivery.send(spool)
    set_terminated = client.set_terminated

    def makes_the_late_run_first(*args):
        create_run(*late[0])
        set_terminated(*args)

    monkeypatch.setattr(client, "set_terminated", makes_the_late_run_first)
    delivery.send(spool)
    spool.leave()
    check(client, named, "late")


def test_what_the_server_will_never_take_is_put_aside_alone_and_the_rest_arrives(
    delivery, client, named, database
):
    spool = new_spool(database / "unsent")
    good = [["loss", 1.0, WHEN, step] for step in range(2)]
    for record in (
        {
            "op": "start",
            "run": "r",
            "experiment": "digits",
            "name": "refused",
            "parent": "",
            "time": WHEN,
        },
        {"op": "metrics", "run": "r", "values": good[:1]},
        {"op": "metrics", "run": "r", "values": [["no\x00name?*", 1.0, WHEN, 0]]},
        {"op": "metrics", "run": "r", "values": good[1:]},
        {"op": "metrics", "run": "nobody's", "values": good},
        {"op": "artifact", "run": "r", "path": "files/gone/receipt.json"},
        {"op": "finish", "run": "r", "status": "FINISHED", "time": WHEN},
    ):
        spool.append(record)
    assert delivery.send(spool) == 7
    (run,) = named("refused")
    assert (run.info.status, len(client.get_metric_history(run.info.run_id, "loss"))) == (
        "FINISHED",
        2,
    )
    lines = [json.loads(line) for line in (spool.path / "refused.jsonl").read_text().splitlines()]
    assert [line["record"]["op"] for line in lines] == ["metrics", "metrics", "artifact"]
    assert "its run is not known" in lines[1]["reason"]
    assert "there is no file" in lines[2]["reason"]
    spool.leave()
    assert [path.name for path in spool.path.iterdir()] == ["refused.jsonl"]
    done = sync(database)
    assert done.refused == (spool.path / "refused.jsonl",)
    assert list(done.in_words(database)) == [
        f"records that the server refuses are in {done.refused[0]}"
    ]
    done.refused[0].unlink()
    spool.path.rmdir()


def test_runs_left_open_by_a_kill_are_marked_and_a_second_sync_has_nothing_to_do(database, named):
    spool = waiting(database, "killed")
    records = (spool.path / "records.jsonl").read_bytes().splitlines(keepends=True)
    (spool.path / "records.jsonl").write_bytes(b"".join(records[:-1]))
    spool._file_lock.release()
    done = sync(database)
    address = f"sqlite:///{database / 'mlflow.db'}"
    assert list(done.in_words(database)) == [
        f"7 records delivered to {address}",
        "1 runs that never ended are marked KILLED",
    ]
    (run,) = named("killed")
    assert (run.info.status, run.info.end_time) == ("KILLED", WHEN)
    assert "killed without a word" in run.data.tags["regrad.traceback"]
    assert list(sync(database).in_words(database)) == [f"nothing waits in {database}"]


def test_two_syncs_at_once_deliver_each_record_once(database, client, named):
    for number in range(4):
        waiting(database, f"both {number}")._file_lock.release()
    done = []
    threads = [threading.Thread(target=lambda: done.append(sync(database))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sum(one.delivered.values()) for one in done) == 28
    for number in range(4):
        check(client, named, f"both {number}")
    assert not (database / "unsent").exists()


def test_a_process_that_is_under_way_is_left_alone_by_sync(database, delivery, named):
    spool = waiting(database, "alive")
    done = sync(database)
    assert (done.busy, done.delivered, done.waiting) == (1, {}, 0)
    assert list(done.in_words(database)) == [
        "1 processes are under way there and deliver by themselves"
    ]
    delivery.send(spool)
    spool.leave()
    assert take_spool(spool.path) is None


def test_without_a_server_sync_says_what_waits_and_why(tmp_path):
    (tmp_path / "config.yaml").write_text("tracking_uri: http://127.0.0.1:9\n")
    spool = new_spool(tmp_path / "unsent")
    spool.append(
        {
            "op": "start",
            "run": "r",
            "address": "http://127.0.0.1:9",
            "time": WHEN,
            "experiment": "digits",
        }
    )
    spool.leave()
    done = sync(tmp_path)
    (line,) = done.in_words(tmp_path)
    assert line.startswith(f"2 records wait in {tmp_path / 'unsent'}: ")
    assert line.endswith("; run this again later")
    assert "127.0.0.1" in line


def test_only_a_folder_of_ours_is_synced(tmp_path):
    with pytest.raises(ValueError, match="folder must be one that compare or train wrote, got "):
        sync(tmp_path)
