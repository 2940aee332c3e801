"""The examples run as they tell their readers to run them: by the command line in their docstrings."""

import ast
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN_SCRIPT = (
    ROOT / "docs" / "examples" / "own_script.py"
)  # knows nothing of regrad: see its own test
EXAMPLES = sorted(set((ROOT / "docs" / "examples").glob("*.py")) - {OWN_SCRIPT})
MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
MODULES["accelerate"] = ["-m", "accelerate.commands.accelerate_cli"]
SECONDS = 600  # of which a quiet machine needs 10

pytestmark = pytest.mark.timeout(700)


def command_of(example: Path) -> list[str]:
    """The one indented line in an example's docstring, for this interpreter."""
    lines = (ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or "").splitlines()
    (command,) = [line.strip() for line in lines if line.startswith("    ")]
    program, *arguments = shlex.split(command)
    assert str(example.relative_to(ROOT)) in arguments
    return [sys.executable, *MODULES[program], *arguments]


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_by_its_own_command_and_says_what_regrad_did(example, tmp_path):
    ours = ("ACCELERATE_", "MASTER_", "SLURM_", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    # Nothing may be fetched, and what is written to a home or a temporary folder stays in this test's.
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    before = {path for path in ROOT.iterdir() if path.name != "__pycache__"}
    done = subprocess.run(
        command_of(example),
        cwd=ROOT,
        env={**clean, **offline},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "regrad attachment: " in done.stdout
    assert int(re.search(r"^steps(?:_applied)?: (\d+)", done.stdout, flags=re.MULTILINE)[1]) > 0
    changes = re.findall(r"relative_change: (\S+)$", done.stdout, flags=re.MULTILINE)
    assert all(float(change) > 0 for change in changes), (
        done.stdout
    )  # of every correction, where shown
    assert {path for path in ROOT.iterdir() if path.name != "__pycache__"} == before


def test_the_script_without_regrad_is_compared_by_its_own_command(tmp_path):
    text = ast.get_docstring(ast.parse(OWN_SCRIPT.read_text(encoding="utf-8"))) or ""
    command = "".join(
        line.strip("\\ ") + " " for line in text.splitlines() if line.startswith("    ")
    )
    program, subcommand, *words = shlex.split(command)
    assert (program, subcommand) == ("regrad", "compare")
    out = tmp_path / "out"
    smaller = ["--corrections", "xgrad", "--seeds", "2", "--jobs", "2", "--out", str(out)]
    words = [*smaller, *words[words.index("--measure") :], "--epochs", "2"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-m", "regrad_runner", subcommand, *words],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"^xgrad +\.\d{4} ± \.\d{4} ", done.stdout, flags=re.MULTILINE), done.stdout
    assert re.search(r"^nesterov .* control", done.stdout, flags=re.MULTILINE)
    assert "own_script.py" in (out / "report.html").read_text(encoding="utf-8")
    with closing(sqlite3.connect(out / "mlflow.db")) as database:
        (runs,) = database.execute("SELECT count(*) FROM runs").fetchone()
    assert runs == 3 * 2 + 1  # three arms on two seeds, and the comparison itself
