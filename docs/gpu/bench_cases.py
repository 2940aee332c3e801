"""Time the bench's cases one by one until the time is up; what is timed is kept at once.

Usage: python docs/gpu/bench_cases.py FILE.csv --seconds S [--device NAME] [--only PATTERN]
    [--quick]
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from regrad_bench import about, report
from regrad_bench.all_cases import chosen_cases
from regrad_bench.apart import measure_apart
from regrad_bench.cases import Setting
from regrad_bench.measure import Result
from regrad_bench.peers import findings

PAIRS = 20
# What start-up costs is about the host alone.
LEFT_OUT = "start/"


def main() -> None:
    """Time the cases, and print the table."""
    parser = argparse.ArgumentParser(description="Time the bench's cases.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="*")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    ends = time.monotonic() + asked.seconds
    torch.set_num_threads(1)
    typed = shlex.join(["docs/gpu/bench_cases.py", *sys.argv[1:]])
    conditions = about.about(typed, pairs=PAIRS, quick=asked.quick)
    setting = Setting(device=torch.device(asked.device), quick=asked.quick)
    results: list[Result] = []
    names = [case.name for case in chosen_cases(asked.only)]
    for name in names:
        if name.startswith(LEFT_OUT):
            continue
        if time.monotonic() > ends:
            sys.stdout.write(f"{name}: no time left\n")
            continue
        results += measure_apart([name], [setting], pairs=PAIRS, threads=1)
        asked.file.write_text(report.to_csv(results), encoding="utf-8")
    report.show(results, findings(), conditions)


if __name__ == "__main__":
    main()
