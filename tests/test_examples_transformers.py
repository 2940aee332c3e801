"""The examples run as they are, and what they print is what regrad did."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
STEPS = {"plain.py": 32, "accelerate_loop.py": 16, "hf_trainer.py": 24}


@pytest.mark.parametrize("name", STEPS)
def test_an_example_runs_and_every_correction_in_it_changed_something(name, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = dict(re.findall(r"^([\w/-]+): ([\d.e+-]+)$", done.stdout, flags=re.MULTILINE))
    assert int(numbers["steps_applied"]) == STEPS[name]
    named = set(
        re.findall(r'"([a-z-]+)"', re.search(r"(?:attach|RegradCallback)\(.*", (EXAMPLES / name).read_text())[0])
    )
    changes = {key.partition("/")[0] for key in numbers if key.endswith("relative_change") and float(numbers[key]) > 0}
    assert changes == named
