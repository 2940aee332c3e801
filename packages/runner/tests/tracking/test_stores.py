import shutil
import sqlite3
from contextlib import closing

import pytest
from regrad_runner.cli.main import main
from regrad_runner.errors import DiskError
from regrad_runner.tracking import stores as module
from regrad_runner.tracking.delivery import Delivery
from regrad_runner.tracking.spool import new_spool
from regrad_runner.tracking.stores import fault_of, prepare
from regrad_runner.tracking.sync import sync

WHEN = 1_700_000_000_000


@pytest.fixture
def out(tmp_path, schema, monkeypatch):
    """The folder of a run, in which a new database is a copy of one that was made before."""
    (tmp_path / "config.yaml").write_text("tracker: mlflow\n")
    shutil.copyfile(schema, tmp_path / "mlflow.db")
    monkeypatch.setattr(module, "_make", lambda path: shutil.copyfile(schema, path))
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:20_000])


def half_made(path):
    """Leave what a kill leaves of MLflow's migrations: tables, and no word of how far they are."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("DELETE FROM alembic_version")
        database.commit()


DAMAGES = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("this is no database, but long enough to be read as one"),
    "half made": half_made,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_put_aside_said_and_made_anew_from_the_records(out, damage, capsys):
    spool = new_spool(out / "unsent")
    spool.append({"op": "start", "run": "r", "time": WHEN, "experiment": "digits", "name": "r"})
    spool.leave()
    DAMAGES[damage](out / "mlflow.db")
    damaged = (out / "mlflow.db").read_bytes()
    assert main(["sync", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"the database '{out / 'mlflow.db'}' cannot be used: it" in said
    assert "2 records delivered to" in said
    assert (out / "mlflow.db.damaged-1").read_bytes() == damaged
    assert fault_of(out / "mlflow.db") is None


@pytest.mark.filterwarnings("ignore:Unnamed CHECK constraint:UserWarning")
def test_a_schema_that_mlflow_cannot_go_on_with_is_put_aside(out):
    with closing(sqlite3.connect(out / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.execute("DROP TABLE inputs")
        database.commit()
    delivery = Delivery(out, None)
    assert delivery.connect().search_experiments()
    assert any(words in delivery.notes[0] for words in module.HALF_MADE), delivery.notes
    assert (out / "mlflow.db.damaged-1").is_file()


def test_what_was_delivered_to_a_database_that_is_lost_is_sent_again(out, schema):
    spool = new_spool(out / "unsent")
    spool.append({"op": "start", "run": "r", "time": WHEN, "experiment": "digits", "name": "r"})
    for step in range(3):
        spool.append({"op": "metrics", "run": "r", "values": [["loss", 0.5, WHEN, step]]})
    assert Delivery(out, None).send(spool) == 4
    (out / "mlflow.db").unlink()
    shutil.copyfile(schema, out / "new.db")
    (out / "new.db").rename(out / "mlflow.db")
    spool.append({"op": "finish", "run": "r", "status": "FINISHED", "time": WHEN})
    delivery = Delivery(out, None)
    delivery.uri = f"sqlite:///{out}/./mlflow.db"  # another process would open the new file too
    delivery.send(spool)
    (run,) = delivery.connect().search_runs([spool.sent.runs["r"][0]], "attributes.run_name = 'r'")
    history = delivery.connect().get_metric_history(run.info.run_id, "loss")
    assert ([point.step for point in history], run.info.status) == ([0, 1, 2], "FINISHED")
    spool.leave()


def test_a_kill_while_the_schema_is_made_leaves_no_database(tmp_path, monkeypatch):
    def killed(uri):
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("CREATE TABLE experiments (name TEXT)")
            database.commit()
        raise KeyboardInterrupt

    monkeypatch.setattr("mlflow.tracking.MlflowClient", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "mlflow.db", own=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_a_schema_is_removed(out):
    (out / ".mlflow.db.0123.part").write_bytes(b"half a schema")
    prepare(out / "mlflow.db", own=True)
    assert not (out / ".mlflow.db.0123.part").exists()


def test_a_damaged_database_that_somebody_named_stays_as_it_is(out):
    cut(out / "mlflow.db")
    before = (out / "mlflow.db").read_bytes()
    with pytest.raises(DiskError, match="must be one of MLflow, but it is"):
        prepare(out / "mlflow.db", own=False)
    assert (out / "mlflow.db").read_bytes() == before


def test_a_folder_in_the_place_of_the_database_has_the_records_wait(out):
    (out / "mlflow.db").unlink()
    (out / "mlflow.db").mkdir()
    spool = new_spool(out / "unsent")
    spool.append({"op": "start", "run": "r", "time": WHEN, "experiment": "digits", "name": "r"})
    spool.leave()
    done = sync(out)
    assert (done.waiting, done.delivered) == (2, {})
    assert "must be a file, got a link or a folder" in done.problem
