import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_hostile_cases_give_a_right_result_or_a_clear_error(tmp_path):
    environment = {
        **os.environ,
        cases.TIMES: "10",
        cases.COUNTS: str(tmp_path / "counts"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent),
        "-k",
        "any",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counts = Counter((tmp_path / "counts").read_text(encoding="utf-8").split())
    sys.stdout.write(f"{sum(counts.values())} cases: {dict(counts)}\n")  # pytest -s, or -rP
    assert sum(counts.values()) >= 10_000
