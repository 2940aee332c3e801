import errno
import json
import os
import subprocess
import sys

import pytest
from regrad_runner.tracking import spool as module
from regrad_runner.tracking.spool import new_spool, spools, take_spool


@pytest.fixture
def unsent(tmp_path):
    return tmp_path / "unsent"


def numbered(number):
    """A record of a known form, to be known again."""
    return {"op": "metrics", "run": "r", "values": [["loss", 0.5, 1, number]]}


def line(number):
    """How a record stands in its file."""
    return json.dumps(numbered(number)) + "\n"


def numbers(spool):
    return [record["values"][0][3] for _, record in spool.read()]


def started(run, time=1, **more):
    return {"op": "start", "run": run, "time": time, "experiment": "digits", **more}


def finished(run, time=1):
    return {"op": "finish", "run": run, "time": time, "status": "FINISHED"}


def left_behind(unsent, *records):
    """Return the path of a spool whose process is gone."""
    spool = new_spool(unsent)
    for record in records:
        spool.append(record)
    spool.leave()
    return spool.path


def test_records_come_back_in_order_until_they_are_noted_as_sent(unsent):
    spool = new_spool(unsent)
    for number in range(5):
        spool.append(numbered(number))
    assert (numbers(spool), spool.waiting) == ([0, 1, 2, 3, 4], 5)
    spool.note_sent([line for line, _ in spool.read()[:2]])
    assert (numbers(spool), spool.waiting) == ([2, 3, 4], 3)
    assert json.loads((spool.path / "sent.json").read_text())["offset"] == 2 * len(line(0))


def test_many_records_are_read_a_part_at_a_time(unsent, monkeypatch):
    monkeypatch.setattr(module, "READ_AT_ONCE", 2)
    spool = new_spool(unsent)
    for number in range(5):
        spool.append(numbered(number))
    seen = []
    while records := spool.read():
        seen.append([record["values"][0][3] for _, record in records])
        spool.note_sent([line for line, _ in records])
    assert seen == [[0, 1], [2, 3], [4]]


def test_a_spool_that_is_delivered_leaves_nothing(unsent):
    spool = new_spool(unsent)
    spool.append(started("a"))
    spool.note_sent([line for line, _ in spool.read()])
    spool.leave()
    assert not unsent.exists()


def test_a_spool_belongs_to_one_until_its_process_is_gone(unsent):
    spool = new_spool(unsent)
    spool.append(started("a", address="http://there:1"))
    assert spools(unsent) == [spool.path]
    assert spool.address() == "http://there:1"
    assert take_spool(spool.path) is None
    spool.leave()
    taken = take_spool(spool.path)
    assert take_spool(spool.path) is None
    taken.leave()


def test_a_spool_that_another_one_delivered_meanwhile_is_not_taken(unsent):
    path = left_behind(unsent, started("a"))
    first = take_spool(path)
    first.take_up()
    first.note_sent([line for line, _ in first.read()])
    first.leave()
    assert take_spool(path) is None


def test_runs_that_a_killed_process_left_open_end_as_killed_at_its_last_time(unsent):
    path = left_behind(
        unsent,
        started("parent", 10),
        started("done", 11),
        started("child", 12),
        finished("done", 13),
        {"op": "metrics", "run": "child", "time": 20, "values": []},
    )
    spool = take_spool(path)
    assert spool.take_up() == 2
    *_, child, parent = [record for _, record in spool.read()]
    assert [(r["op"], r["run"], r["status"], r["time"]) for r in (child, parent)] == [
        ("finish", "child", "KILLED", 20),
        ("finish", "parent", "KILLED", 20),
    ]
    spool.leave()
    again = take_spool(path)
    assert (again.take_up(), again.waiting) == (2, 7)


def test_a_kill_loses_no_record_that_was_taken_and_a_torn_line_does_no_harm(unsent, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from regrad_runner.tracking.spool import new_spool
spool = new_spool(Path({str(unsent)!r}))
for number in range(100):
    spool.append({{"op": "metrics", "run": "r", "values": [["loss", 0.5, 1, number]]}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (path,) = spools(unsent)
    with (path / "records.jsonl").open("ab") as file:
        file.write(b'{"op": "metrics", "num')
    spool = take_spool(path)
    spool.take_up()
    assert numbers(spool) == list(range(100))
    spool.append(numbered(100))
    assert numbers(spool) == list(range(101))


def test_a_damaged_line_and_a_damaged_note_lose_nothing_else(unsent):
    path = left_behind(unsent, started("a"), {"op": "metrics", "run": "a", "values": []})
    lines = (path / "records.jsonl").read_bytes().splitlines(keepends=True)
    (path / "records.jsonl").write_bytes(lines[0] + b"\x00\xff\n" + lines[1])
    (path / "sent.json").write_text("")
    spool = take_spool(path)
    spool.take_up()
    assert [record["op"] for _, record in spool.read()] == [
        "start",
        "unreadable",
        "metrics",
        "finish",
    ]


def test_a_file_is_copied_and_forgotten(unsent, tmp_path):
    (tmp_path / "receipt.json").write_text("{}")
    spool = new_spool(unsent)
    name = spool.keep_file(tmp_path / "receipt.json")
    copy = spool.file(name)
    assert copy.read_text() == "{}"
    assert copy != tmp_path / "receipt.json"
    spool.forget_file(name)
    spool.forget_file(str(tmp_path / "receipt.json"))
    assert not copy.parent.exists()
    assert (tmp_path / "receipt.json").exists()


@pytest.fixture
def full_disk(monkeypatch):
    """Return a switch: a disk that takes three bytes more and then is full."""
    real, full = os.write, [False]

    def write(file, data):
        if not full[0]:
            return real(file, data)
        if len(data) > 3:
            return real(file, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    return lambda now: full.__setitem__(0, now)


def test_on_a_full_disk_records_wait_in_memory_and_half_a_line_is_taken_back(unsent, full_disk):
    spool = new_spool(unsent)
    spool.append(numbered(0))
    full_disk(True)
    for number in (1, 2):
        spool.append(numbered(number))
    assert spool.problem.errno == errno.ENOSPC
    assert (spool.path / "records.jsonl").read_text() == line(0)
    assert numbers(spool) == [0]
    spool.note_sent([line for line, _ in spool.read()])
    assert numbers(spool) == [1, 2]
    full_disk(False)
    spool.append(numbered(3))
    assert spool.problem is None
    assert numbers(spool) == [1, 2, 3]


def test_a_record_whose_writing_a_signal_broke_off_comes_once(unsent, monkeypatch):
    spool, write = new_spool(unsent), os.write
    spool.append(numbered(0))

    def broken_off(file, data):
        write(file, data[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken_off)
        with pytest.raises(KeyboardInterrupt):
            spool.append(numbered(1))
    assert numbers(spool) == [0]
    spool.append(numbered(2))
    assert (numbers(spool), spool.waiting) == ([0, 1, 2], 3)


def test_what_was_sent_from_memory_is_neither_written_nor_sent_again(unsent, full_disk):
    spool = new_spool(unsent)
    full_disk(True)
    for number in range(3):
        spool.append(numbered(number))
    read = spool.read()
    spool.note_sent([read[0][0]])
    full_disk(False)
    spool.append(numbered(3))  # which writes 1 and 2 too, after they were read
    spool.note_sent([read[1][0]])
    assert (numbers(spool), spool.waiting) == ([2, 3], 2)


def test_a_file_that_there_is_no_room_for_is_sent_from_where_it_is(unsent, tmp_path, monkeypatch):
    (tmp_path / "receipt.json").write_text("{}")

    def no_room(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", no_room)
    spool = new_spool(unsent)
    assert spool.file(spool.keep_file(tmp_path / "receipt.json")) == tmp_path / "receipt.json"
    assert not list(unsent.rglob("receipt.json"))
