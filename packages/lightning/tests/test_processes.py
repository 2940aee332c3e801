"""Fits on two processes, started once for all of these tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(700)
SECONDS = 600  # of which a quiet machine needs 20


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the first of two processes said of each of its fits."""
    script, folder = (
        Path(__file__).parent / "one_of_two_processes.py",
        tmp_path_factory.mktemp("two"),
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "MASTER_", "SLURM_"))
    }
    done = subprocess.run(
        [*launch, str(script), str(folder)],
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [path.name for path in folder.glob("*.json")] == ["regrad-receipt.json"]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_two_processes_are_one_process_with_automatic_and_manual_optimization(seen):
    assert float(seen["ddp"]) <= 1e-12
    assert float(seen["manual"]) <= 1e-12
    assert seen["acting"] == "['agc', 'centralization', 'powergrad', 'xgrad']"


def test_a_fit_on_two_processes_is_resumed_bit_for_bit(seen):
    assert float(seen["resume"]) == 0
    assert float(seen["resumed-to-one"]) <= 1e-12


def test_shards_are_one_process_and_resume_with_each_process_its_own_part(seen):
    assert float(seen["fsdp2"]) <= 1e-12
    assert float(seen["fsdp2-resume"]) <= 1e-12
    assert float(seen["fsdp2-steps"]) == 12


def test_what_is_not_exact_on_shards_and_a_state_of_whole_weights_are_refused(seen):
    assert seen["fsdp2-refused"].startswith(
        "'gcode' is not exact on layout 'fsdp2'; it is on plain, ddp;"
    )
    assert (
        "must come from 2 processes with shards, got that of whole weights" in seen["fsdp2-whole"]
    )
