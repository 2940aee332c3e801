"""Run every case of `cases_*.py` as one of two processes; `test_processes.py` starts both.

Usage: python workers.py RANK FOLDER. Every case has a process group of its own; what it
raised is written to FOLDER/RANK.json.
"""

import importlib
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

from torch import distributed

WORLD = 2
PATIENCE = timedelta(seconds=60)


def cases():
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        for name, case in vars(importlib.import_module(path.stem)).items():
            if name.startswith("case_"):
                yield name, case


def run(rank, folder):
    results = {}
    for name, case in list(cases()):
        store = distributed.FileStore(str(folder / name), WORLD)
        options = {"rank": rank, "world_size": WORLD, "timeout": PATIENCE}
        distributed.init_process_group(
            "gloo", store=distributed.PrefixStore("group", store), **options
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                case(rank)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        store.set(f"done {rank}", "")
        store.wait([f"done {other}" for other in range(WORLD)], PATIENCE)
        distributed.destroy_process_group()
        (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
