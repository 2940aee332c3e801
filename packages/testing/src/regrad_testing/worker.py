"""What one of several gloo processes does for a suite; `processes.launch` starts them all."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from regrad_testing.files import load_file

WORLD = 2
PATIENCE = timedelta(seconds=60)


def run_case(
    case: Callable[[int], Any], rank: int, folder: Path, number: int, world: int = WORLD
) -> dict[str, Any]:
    """Run one case in a process group of its own; return its result, or what it raised."""
    store = FileStore(str(folder / f"rendezvous {number}"), world)
    group: Any = PrefixStore("group", store)
    distributed.init_process_group(
        "gloo", store=group, rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        result: dict[str, Any] = case(rank)
    except BaseException:  # noqa: BLE001 - whatever an author's code raises is the result, and the next case runs
        result = {"error": traceback.format_exc()}
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world)], PATIENCE)
    distributed.destroy_process_group()
    return result


def work(file: str, qualified_name: str, folder: Path, rank: int, world: int = WORLD) -> None:
    """Run the cases of a suite, write their results to FOLDER/RANK.json, and leave the process.

    Args:
        file: Where the suite is.
        qualified_name: Of its class in that file.
        folder: For rendezvous, results, and what is printed.
        rank: From 0.
        world: How many processes there are.
    """
    printed = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(printed, stream)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    suite: Any = load_file(Path(file), "regrad_testing_suite")
    for part in qualified_name.split("."):
        suite = getattr(suite, part)
    results = {
        name: run_case(case, rank, folder, i, world)
        for i, (name, case) in enumerate(suite.cases().items())
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit
