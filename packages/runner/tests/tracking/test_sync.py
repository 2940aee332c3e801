import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from regrad_runner.cli.main import main
from regrad_runner.tracking.delivery import Delivery
from regrad_runner.tracking.spool import new_spool, spools
from regrad_runner.tracking.sync import sync

WHEN = 1_700_000_000_000
SECRET = "s3kret-w0rd"


@pytest.fixture
def out(tmp_path, schema):
    """The folder of a run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.yaml").write_text("tracker: mlflow\n")
    shutil.copyfile(schema, folder / "mlflow.db")
    return folder


def everything_in(folder):
    """What lies in a folder: kinds, contents and ends of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def victim(tmp_path):
    """A folder beside the run's, which has what a spool has, and must be byte for byte what it was."""
    folder = tmp_path / "victim"
    (folder / "files" / "0123abcd").mkdir(parents=True)
    for name in ("thesis.txt", "sent.json", "records.jsonl", "files/0123abcd/receipt.json"):
        (folder / name).write_text(f"the content of {name}")
    before = everything_in(folder)
    yield folder
    assert everything_in(folder) == before


def start(run="r", **more):
    return {"op": "start", "run": run, "time": WHEN, "experiment": "digits", "name": run, **more}


def finish(run="r"):
    return {"op": "finish", "run": run, "status": "FINISHED", "time": WHEN}


def left_behind(out, *records):
    """Return the folder of a spool whose process is gone, with a copy in it."""
    (out.parent / "receipt.json").write_text("{}")
    spool = new_spool(out / "unsent")
    spool.keep_file(out.parent / "receipt.json")
    for record in records:
        spool.append(record)
    spool.leave()
    return spool.path


def refused_in(path):
    lines = (path / "refused.jsonl").read_text().splitlines()
    return [json.loads(line)["record"]["op"] for line in lines]


HOSTILE_PATHS = [
    "../../../victim/thesis.txt",
    "files/../../../../victim/thesis.txt",
    "files/0123abcd/../../../../../victim/thesis.txt",
    "files/0123abcd/..",
    "files/0123abcd/.",
    "files/0123abcd",
    "files",
    ".",
    "",
    "records.jsonl",
    "files/0123abcd/\0",
    "files//receipt.json",
    "files/0123abcd/sub/receipt.json",
    "FILES/0123abcd/receipt.json",
    "{victim}/thesis.txt",
    "{victim}/files/0123abcd/receipt.json",
    "file://{victim}/thesis.txt",
    "~/thesis.txt",
    7,
    None,
    ["files/0123abcd/receipt.json"],
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_record_that_names_anything_but_a_copy_is_refused_and_removes_nothing(out, victim, path):
    named = path.format(victim=victim) if isinstance(path, str) else path
    spool = left_behind(out, start(), {"op": "artifact", "run": "r", "path": named}, finish())
    done = sync(out)
    assert (done.waiting, sum(done.delivered.values())) == (0, 3)
    assert refused_in(spool) in (["artifact"], ["unreadable"])
    assert not list(out.rglob("thesis.txt"))


@pytest.mark.parametrize("linked", ["receipt.json", "0123abcd", "files"])
def test_a_copy_that_is_a_link_or_lies_behind_one_is_not_sent(out, victim, linked):
    spool = left_behind(
        out,
        start(),
        {"op": "artifact", "run": "r", "path": "files/0123abcd/receipt.json"},
        finish(),
    )
    shutil.rmtree(spool / "files")
    place = {
        "receipt.json": spool / "files" / "0123abcd" / "receipt.json",
        "0123abcd": spool / "files" / "0123abcd",
        "files": spool / "files",
    }[linked]
    place.parent.mkdir(parents=True, exist_ok=True)
    ends = {"receipt.json": victim / "thesis.txt", "0123abcd": victim / "files" / "0123abcd"}
    place.symlink_to(ends.get(linked, victim / "files"))
    sync(out)
    assert not (out / "artifacts").exists()


@pytest.mark.parametrize("name", ["20260102-030405-1a2b3c4d", "evil", "..."])
def test_a_spool_that_is_a_link_is_left_alone(out, victim, name):
    (out / "unsent").mkdir()
    (out / "unsent" / name).symlink_to(victim)
    assert list(sync(out).in_words(out)) == [f"nothing waits in {out}"]


@pytest.mark.parametrize("name", ["records.jsonl", "sent.json", "refused.jsonl"])
def test_a_spool_with_a_link_in_it_is_left_alone(out, victim, name):
    spool = left_behind(out, start(), finish())
    (spool / name).unlink(missing_ok=True)
    (spool / name).symlink_to(victim / "records.jsonl")
    assert spools(out / "unsent") == []
    sync(out)
    assert (spool / name).is_symlink()


def test_a_link_in_the_place_of_all_spools_is_one_line_and_exit_code_2(out, victim, capsys):
    (out / "unsent").symlink_to(victim)
    assert main(["sync", str(out)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "unsent' must be a folder, got a link" in said.err


def test_a_lock_that_is_a_link_is_not_opened(out, victim):
    spool = left_behind(out, start(), finish())
    lock = spool.with_name(f"{spool.name}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim / "new-file")
    assert main(["sync", str(out)]) == 2


@pytest.mark.parametrize("ending", ["", "-journal", "-wal", "-shm", ".lock"])
def test_a_database_that_is_a_link_or_has_one_beside_it_is_not_opened(out, victim, schema, ending):
    left_behind(out, start(), finish())
    (out / "mlflow.db.lock").unlink(missing_ok=True)
    (out / f"mlflow.db{ending}").unlink(missing_ok=True)
    (out / f"mlflow.db{ending}").symlink_to(victim / "thesis.txt")
    done = sync(out)
    assert (done.waiting, done.delivered) == (2, {})
    assert "must be a file, got a link or a folder" in done.problem


@pytest.mark.parametrize("place", ["victim", "artifacts/../../victim", "link", "file"])
def test_a_database_that_has_files_written_elsewhere_is_not_obeyed(out, victim, place):
    spool = left_behind(out, start(), {"op": "metrics", "run": "r", "values": []})
    sync(out)  # makes the run, whose database is then changed
    shutil.rmtree(out / "unsent", ignore_errors=True)
    with closing(sqlite3.connect(out / "mlflow.db")) as database:
        (run,) = database.execute("SELECT run_uuid FROM runs").fetchone()
        own = out / "artifacts" / run / "artifacts"
        (out / "artifacts").mkdir(exist_ok=True)
        uris = {"link": own.as_uri(), "file": own.as_uri()}
        uri = uris.get(place, (out.parent if place == "victim" else out).as_uri() + f"/{place}")
        database.execute("UPDATE runs SET artifact_uri = ?", (uri,))
        database.commit()
    if place == "link":
        own.parent.mkdir(parents=True)
        own.symlink_to(victim)
    if place == "file":
        own.mkdir(parents=True)
        (own / "traceback.txt").symlink_to(victim / "thesis.txt")
    spool = left_behind(
        out, start(), {"op": "text", "run": "r", "name": "traceback.txt", "text": "ours"}, finish()
    )
    sync(out)
    assert refused_in(spool) == ["text"]


@pytest.mark.parametrize(
    "address", ["sqlite:///{victim}/thesis.txt", "sqlite:///{victim}/new.db", "http://127.0.0.1:9"]
)
def test_an_address_that_only_records_name_is_not_gone_to(out, victim, address, capsys):
    address = address.format(victim=victim)
    left_behind(out, start(address=address), finish())
    assert main(["sync", str(out)]) == 1
    said = capsys.readouterr().out
    assert f"2 records wait in {out / 'unsent'} for {address}, which is not the folder's" in said
    assert f"--tracking-uri {address} delivers them" in said


def test_an_address_is_gone_to_when_it_is_given_or_in_the_settings(out, tmp_path, schema):
    shutil.copyfile(schema, tmp_path / "other.db")
    address = f"sqlite:///{tmp_path / 'other.db'}"
    left_behind(out, start("first", address=address), finish("first"))
    assert sync(out, address).delivered == {address: 2}
    (out / "config.yaml").write_text(f"tracking_uri: {address}\n")
    left_behind(out, start("second", address=address), finish("second"))
    assert sync(out).delivered == {address: 2}


def test_a_database_of_another_program_is_not_changed(out, tmp_path, capsys):
    theirs = tmp_path / "theirs.db"
    with closing(sqlite3.connect(theirs)) as database:
        database.execute("CREATE TABLE books (title TEXT)")
        database.commit()
    before = theirs.read_bytes()
    left_behind(out, start(address=f"sqlite:///{theirs}"), finish())
    assert main(["sync", str(out), "--tracking-uri", f"sqlite:///{theirs}"]) == 1
    assert (
        "must be one of MLflow, but it is not whole, or of another program"
        in capsys.readouterr().out
    )
    assert theirs.read_bytes() == before


@pytest.mark.parametrize(
    "record",
    [
        {},
        [],
        7,
        None,
        "text",
        [["op", "start"]],
        {"op": "start"},
        {"op": "start", "run": "r"},
        {"op": "start", "run": "r' OR '1' = '1", "time": WHEN, "experiment": "digits"},
        {"op": "start", "run": "r", "time": "late", "experiment": "digits"},
        {"op": "metrics", "run": "r"},
        {"op": "metrics", "run": "r", "values": [1]},
        {"op": "metrics", "run": "r", "values": [["loss", "high", 1, 1]]},
        {"op": "params", "run": "r", "values": {"lr": 1}},
        {"op": "text", "run": "r", "name": "../../../victim/thesis.txt", "text": "ours"},
        {"op": "finish", "run": "r", "status": "GREAT", "time": WHEN},
        {"op": "remove", "run": "r"},
    ],
)
def test_a_record_of_no_known_form_is_put_aside_and_the_others_arrive(out, victim, record):
    spool = left_behind(out, start("good"), record, finish("good"))
    done = sync(out)
    assert (sum(done.delivered.values()), done.waiting, refused_in(spool)) == (3, 0, ["unreadable"])


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "{}",
        "[]",
        "null",
        "\0",
        '{"offset": -1}',
        '{"offset": 3}',
        '{"offset": 1e9}',
        '{"offset": "0"}',
        '{"offset": 99999999}',
        '{"runs": {"r": "x"}}',
        '{"runs": {"r": ["1"]}}',
        '{"offset": 0, "runs": []}',
    ],
)
def test_a_damaged_note_of_what_was_sent_has_all_sent_again(out, sent):
    spool = left_behind(out, start(), finish())
    (spool / "sent.json").write_text(sent)
    done = sync(out)
    assert (sum(done.delivered.values()), done.waiting, done.refused) == (2, 0, ())
    assert not (out / "unsent").exists()


def test_records_that_were_refused_end_with_exit_code_1(out, capsys):
    left_behind(out, start(), {}, finish())
    assert main(["sync", str(out)]) == 1
    assert "records that the server refuses are in" in capsys.readouterr().out
    assert main(["sync", str(out)]) == 1


def test_records_are_for_their_owner_alone(out):
    spool = left_behind(out, start())
    assert (spool.stat().st_mode & 0o077, (spool / "records.jsonl").stat().st_mode & 0o077) == (
        0,
        0,
    )


def test_a_password_is_refused_in_the_flag_and_in_the_settings_and_never_shown(out, capsys):
    address = f"http://me:{SECRET}@127.0.0.1:9"
    left_behind(out, start(address=address), finish())
    for words in ([], ["--tracking-uri", address]):
        main(["sync", str(out), *words])
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
    (out / "config.yaml").write_text(f"tracking_uri: {address}\n")
    assert main(["sync", str(out)]) == 2
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err
    assert SECRET not in said.out + said.err


def test_an_experiment_that_was_deleted_is_named_and_its_records_arrive_when_it_is_restored(
    out, capsys
):
    left_behind(out, start("before"), finish("before"))
    assert main(["sync", str(out)]) == 0
    client = Delivery(out, None).connect()
    experiment = client.get_experiment_by_name("digits").experiment_id
    client.delete_experiment(experiment)
    left_behind(out, start("after"), finish("after"))
    capsys.readouterr()
    for _ in range(2):
        assert main(["sync", str(out)]) == 1
        said = capsys.readouterr().out
        assert "2 records wait in" in said
        assert (
            "experiment 'digits' was deleted; restore it, such as by 'mlflow experiments restore "
            f"--experiment-id {experiment}'" in said
        )
    client.restore_experiment(experiment)
    assert main(["sync", str(out)]) == 0
    (run,) = client.search_runs([experiment], "attributes.run_name = 'after'")
    assert run.info.status == "FINISHED"


def test_an_experiment_that_is_deleted_in_the_middle_of_a_run_keeps_its_records_waiting(out):
    client = Delivery(out, None).connect()
    delivery, spool = Delivery(out, None), new_spool(out / "unsent")
    spool.append(start())
    delivery.send(spool)
    experiment = spool.sent.runs["r"][0]
    client.delete_experiment(experiment)
    spool.append({"op": "metrics", "run": "r", "values": [["loss", 1.0, WHEN, 1]]})
    with pytest.raises(Exception, match="experiment 'digits' was deleted; restore it"):
        delivery.send(spool)
    assert spool.waiting == 1
    client.restore_experiment(experiment)
    delivery.send(spool)
    assert (spool.waiting, (spool.path / "refused.jsonl").exists()) == (0, False)
    spool.leave()
