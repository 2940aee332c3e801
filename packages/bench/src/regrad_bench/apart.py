"""Measure every case in its own process: what one allocates must not change the next one's time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from regrad_bench.all_cases import chosen_cases
from regrad_bench.cases import Setting
from regrad_bench.measure import Result, measure


def measure_apart(
    names: Sequence[str],
    settings: Sequence[Setting],
    *,
    pairs: int,
    threads: int,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Result]:
    """Measure every case in every setting, one after the other.

    Args:
        names: The cases.
        settings: The settings, such as one for each device.
        pairs: Pairs to time.
        threads: CPU threads of each process.
        tell: Told the name of each case before it starts.
    """
    # A server that has imported everything and computed nothing hands out fresh processes at once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    results = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for setting in settings:
            for name in names:
                tell(f"{name} on {setting.device.type}")
                results.append(pool.submit(measure_named, name, setting, pairs, threads).result())
    return results


def measure_named(name: str, setting: Setting, pairs: int, threads: int) -> Result:
    """Measure the case of that name in this process, with so many threads."""
    torch.set_num_threads(threads)
    return measure(chosen_cases(name)[0], setting, pairs=pairs)
