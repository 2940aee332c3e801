import shutil
import sqlite3
from contextlib import closing

import pytest
from regrad_runner.cli.main import main
from regrad_runner.errors import DiskError
from regrad_runner.results.about import LAYOUT
from regrad_runner.results.outcomes import Result
from regrad_runner.results.sync import sync
from regrad_runner.tracking import stores as module
from regrad_runner.tracking.mlflow import project
from regrad_runner.tracking.stores import Store, fault_of, prepare


@pytest.fixture
def out(tmp_path, schema, ready_schema, ended_run):
    """The folder of a run, in which a new database is a copy of one that was made before."""
    folder = tmp_path / "out"
    ended_run(folder, Result(arm="baseline", seed=0, value=0.5, lr=0.1))
    (folder / "config.yaml").write_text("tracker: mlflow\n")
    (folder / "about.json").write_text(
        f'{{"layout": {LAYOUT}, "kind": "run", "workload": "digits"}}'
    )
    shutil.copyfile(schema, folder / "mlflow.db")
    return folder


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
def test_a_damaged_database_is_put_aside_said_and_made_anew_from_the_folders(out, damage, capsys):
    DAMAGES[damage](out / "mlflow.db")
    damaged = (out / "mlflow.db").read_bytes()
    assert main(["sync", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"the database '{out / 'mlflow.db'}' cannot be used: it" in said
    assert "of 1 runs sent to" in said
    assert (out / "mlflow.db.damaged-1").read_bytes() == damaged
    assert fault_of(out / "mlflow.db") is None
    assert main(["sync", str(out)]) == 0
    assert capsys.readouterr().out.startswith("everything in")


def test_a_database_that_is_damaged_under_way_is_put_aside_and_filled_again(
    out, tracked_run, held, wanted
):
    store = Store(out)
    project(store, tracked_run)
    cut(out / "mlflow.db")
    with pytest.raises(Exception, match=r"malformed|disk image|database"):
        project(store, tracked_run)
    store.forget()
    project(store, tracked_run)
    assert held(store.client(), tracked_run) == wanted


@pytest.mark.filterwarnings("ignore:Unnamed CHECK constraint:UserWarning")
def test_a_schema_that_mlflow_cannot_go_on_with_is_put_aside(out):
    with closing(sqlite3.connect(out / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.execute("DROP TABLE inputs")
        database.commit()
    store = Store(out)
    assert store.client().search_experiments()
    assert any(words in store.notes[0] for words in module.HALF_MADE), store.notes
    assert (out / "mlflow.db.damaged-1").is_file()


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
    with pytest.raises(DiskError, match="must be an MLflow database, but it is"):
        prepare(out / "mlflow.db", own=False)
    assert (out / "mlflow.db").read_bytes() == before


def test_a_folder_in_the_place_of_the_database_is_said_and_nothing_is_lost(out):
    (out / "mlflow.db").unlink()
    (out / "mlflow.db").mkdir()
    done = sync(out)
    assert (done.sent.points, done.is_complete) == (0, False)
    assert "must be a file, got a link or a folder" in done.problems[0]
    (out / "mlflow.db").rmdir()
    assert sync(out).is_complete


@pytest.mark.parametrize("ending", ["", "-journal", "-wal", "-shm", ".lock"])
def test_a_database_that_is_a_link_or_has_one_beside_it_is_not_opened(out, tmp_path, ending):
    victim = tmp_path / "thesis.txt"
    victim.write_text("mine")
    (out / f"mlflow.db{ending}").unlink(missing_ok=True)
    (out / f"mlflow.db{ending}").symlink_to(victim)
    done = sync(out)
    assert not done.is_complete
    assert "must be a file, got a link or a folder" in done.problems[0]
    assert victim.read_text() == "mine"


def test_a_database_of_another_program_is_not_changed(out, tmp_path, capsys):
    theirs = tmp_path / "theirs.db"
    with closing(sqlite3.connect(theirs)) as database:
        database.execute("CREATE TABLE books (title TEXT)")
        database.commit()
    before = theirs.read_bytes()
    assert main(["sync", str(out), "--tracking-uri", f"sqlite:///{theirs}"]) == 1
    said = capsys.readouterr().out
    assert "must be an MLflow database, but it is incomplete, or belongs to another program" in said
    assert theirs.read_bytes() == before
