import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import regrad
import torch
from regrad_runner.checkpoints.folder import checkpoints, read_checkpoint
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.sync import sync

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
STACK = [name for name in ("adanorm", "xgrad", "powergrad", "agc") if name in regrad.available()]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="kills.py forks and reads /proc"),
    pytest.mark.timeout(900),
]


def killed(folder, *, seed, runs, kills, corrections):
    """Let `kills.py` work; return what its kills hit, a list per run."""
    command = [
        sys.executable,
        str(HERE / "kills.py"),
        str(folder),
        *map(str, (seed, runs, kills)),
        *corrections,
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["hits"]


def leaves(value):
    """Yield every tensor and plain value of nested containers, with the way to it."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        yield (), value
        return
    for key, item in pairs:
        for way, leaf in leaves(item):
            yield (key, *way), leaf


def difference(folder, other):
    """Return where the last checkpoints of two runs differ: weights, optimizer, corrections, random numbers."""
    one, two = (
        dict(leaves(read_checkpoint(checkpoints(f / "checkpoints")[-1]).tensors))
        for f in (folder, other)
    )
    assert one.keys() == two.keys()
    same = {
        way: torch.equal(v, two[way]) if isinstance(v, torch.Tensor) else v == two[way]
        for way, v in one.items()
    }
    return [way for way, equal in same.items() if not equal]


def assert_same_end(folder, other):
    assert difference(folder, other) == []
    one, two = ResultsFolder(folder), ResultsFolder(other)
    assert one.curves == two.curves
    assert (
        [(r.steps, r.value) for r in one.results] == [(r.steps, r.value) for r in two.results] != []
    )


def assert_shown_once(folder):
    """Check that a sync leaves every point of the run in the store exactly once."""
    assert sync(folder).is_complete
    assert not sync(folder).sent
    kept = Counter((point.step, "training loss") for point in ResultsFolder(folder).curves)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        found = database.execute("SELECT step, key FROM metrics WHERE key = 'training loss'")
        assert Counter(found.fetchall()) == kept
        statuses = database.execute("SELECT status FROM runs").fetchall()
    assert statuses == [("FINISHED",)]


@pytest.fixture(scope="module")
def ten_kills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder, killed(folder, seed=4, runs=1, kills=10, corrections=STACK)[0]


def test_a_run_killed_ten_times_ends_in_the_weights_of_the_uninterrupted_one(ten_kills):
    folder, hits = ten_kills
    assert len(hits) == 10
    assert {hit["aimed"] for hit in hits} == {
        "step",
        "evaluation",
        "collecting",
        "saving",
        "loading",
    }
    assert_same_end(folder / "killed-0", folder / "whole")


@pytest.mark.usefixtures("ready_schema")
def test_a_run_killed_ten_times_is_shown_once(ten_kills):
    folder, _ = ten_kills
    assert_shown_once(folder / "killed-0")


def test_a_fresh_process_killed_while_it_saves_goes_on_to_the_same_end(ten_kills, tmp_path):
    folder, _ = ten_kills
    settings = ["--config", str(folder / "whole" / "config.yaml"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "regrad_runner", "train"]
    first = subprocess.Popen(
        [*command, *settings], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    saved = tmp_path / "out" / "checkpoints"
    while first.poll() is None and not (
        any(saved.glob(".step-*.part")) and len(checkpoints(saved)) > 1
    ):
        time.sleep(0.0005)
    first.kill()
    assert first.wait() == -9, first.stderr.read()
    first.stderr.close()
    assert 0 < int(checkpoints(saved)[-1].name.removeprefix("step-")) < 60
    again = [*command, "--resume", "--out", str(tmp_path / "out")]
    done = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert_same_end(tmp_path / "out", folder / "whole")


def test_a_difference_would_be_seen(ten_kills, tmp_path):
    folder, _ = ten_kills
    assert difference(folder / "whole", folder / "whole") == []
    last, before = checkpoints(folder / "whole" / "checkpoints")[::-1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / last.name).symlink_to(before)
    assert ("model", "fc.weight") in difference(folder / "whole", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("corrections", [STACK, []], ids=["stack", "none"])
@pytest.mark.usefixtures("ready_schema")
def test_two_hundred_kills_change_no_bit(tmp_path, corrections):
    hits = killed(tmp_path, seed=5, runs=10, kills=10, corrections=corrections)
    for run, _ in enumerate(hits):
        assert_same_end(tmp_path / f"killed-{run}", tmp_path / "whole")
        assert_shown_once(tmp_path / f"killed-{run}")
    hit = Counter(one["hit"] for run in hits for one in run)
    halves = sum(one["left_half"] for run in hits for one in run)
    sys.stdout.write(
        f"kills that hit: {dict(hit)}; {halves} left half a checkpoint\n"
    )  # pytest -s, or -rP
    assert sum(hit.values()) >= 95, hit  # a life may reach its end before its kill
    assert hit.keys() >= {"step", "evaluation", "collecting", "saving", "loading"}
    assert halves > 0
