"""The example that never attaches, by its own command; `test_scripts_examples` has the others."""

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
OWN_SCRIPT = ROOT / "docs" / "examples" / "own_script.py"
SECONDS = 600  # of which a quiet machine needs 10

pytestmark = [pytest.mark.long, pytest.mark.timeout(700)]


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
