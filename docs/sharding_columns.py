"""The columns of the page on layouts, and what the processes run that measure them."""

import functools
import os
from collections.abc import Callable
from typing import Any

import sharding_by_hand
import sharding_cells as cells
import sharding_meshes
import torch
from regrad import RegradError
from regrad_testing.layout_clauses import ddp, fsdp2, fsdp2_by_columns
from regrad_testing.worker import WORLD
from sharding_cells import FLOAT32, FLOAT64, Column, Layout, Measure, Seen, wrapped_by
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.nn.parallel import DistributedDataParallel

NAMES = "REGRAD_SHARDING_NAMES"
TITLES = "REGRAD_SHARDING_COLUMNS"  # those to measure, a line each; all where there is no line

LAYOUTS: dict[str, dict[str, Layout]] = {
    "DDP": {
        "": wrapped_by(ddp),
        "unused parameters": wrapped_by(cells.ddp_with_unused),
        "bucket views": wrapped_by(
            functools.partial(DistributedDataParallel, gradient_as_bucket_view=True)
        ),
    },
    "DDP, static graph": {
        "": wrapped_by(functools.partial(DistributedDataParallel, static_graph=True))
    },
    "`replicate`": {
        "of DDP": wrapped_by(cells.replicated_by_ddp),
        "of FSDP2": wrapped_by(cells.replicated_by_fsdp2),
    },
    "FSDP2": {
        "by rows": wrapped_by(fsdp2),
        "by columns": wrapped_by(fsdp2_by_columns),
        "not resharded": wrapped_by(functools.partial(cells.cut, reshard_after_forward=False)),
    },
    "FSDP2 by accelerate": {"": cells.by_accelerate},
    "FSDP2, CPU offload": {"": wrapped_by(cells.kept_on_the_host)},
    "FSDP2, meta device": {"": wrapped_by(cells.from_the_meta_device)},
    "FSDP1": {
        "flat": wrapped_by(cells.fsdp1),
        "original parameters": wrapped_by(functools.partial(cells.fsdp1, use_orig_params=True)),
    },
    "ZeroRedundancyOptimizer": {"": cells.by_zero},
}
TIED: dict[str, Layout] = {"DDP": wrapped_by(ddp), "FSDP2": wrapped_by(cells.cut_in_one)}
LATER: dict[str, Layout] = {
    "DDP": wrapped_by(cells.ddp_with_unused),
    "FSDP2": wrapped_by(fsdp2),
    "accelerate": cells.by_accelerate,
}
COMES = {"unfrozen": False, "in a new group": True}


def of_layouts() -> list[Column]:
    """Return a column per layout on two processes, and that of HSDP on four."""
    columns = []
    for title, layouts in LAYOUTS.items():
        ways = {way: functools.partial(cells.apart, layout=each) for way, each in layouts.items()}
        columns.append(Column(title, FLOAT64, ways, WORLD))
    hsdp = functools.partial(
        cells.apart, layout=wrapped_by(functools.partial(cells.cut, sizes=(2, 2)))
    )
    return [*columns, Column("HSDP", FLOAT64, {"": hsdp}, 4)]


def later_ways() -> dict[str, Measure]:
    """Return each way in which a parameter comes later, on each layout."""
    ways: dict[str, Measure] = {}
    for way, group in COMES.items():
        for name, layout in LATER.items():
            measure = functools.partial(cells.later_apart, layout=layout, as_group=group)
            ways[f"{way}, {name}"] = measure
    return ways


COLUMNS = [
    Column("1 process", FLOAT64, {"": cells.of_reference}),
    *of_layouts(),
    *sharding_meshes.COLUMNS,
    *sharding_by_hand.COLUMNS,
    Column("accumulation", FLOAT64, {"": cells.in_parts}),
    Column("bf16", FLOAT32, {"": functools.partial(cells.mixed, dtype=torch.bfloat16)}),
    Column(
        "fp16",
        FLOAT32,
        {"": functools.partial(cells.mixed, dtype=torch.float16, scale=cells.SCALE)},
    ),
    Column("fp16, fused", FLOAT32, {"": cells.mixed_and_fused}),
    Column("compiled after attach", FLOAT64, {"": cells.compiled_after}),
    Column("compiled before attach", FLOAT64, {"": cells.compiled_before}),
    Column(
        "checkpointing",
        FLOAT64,
        {"": functools.partial(cells.checkpointed, kind=CheckpointImpl.NO_REENTRANT)},
    ),
    Column(
        "checkpointing, re-entrant",
        FLOAT64,
        {"": functools.partial(cells.checkpointed, kind=CheckpointImpl.REENTRANT)},
    ),
    Column("`step(closure)`", FLOAT64, {"": cells.in_a_closure}),
    Column("several closure calls", FLOAT64, {"": cells.in_several_calls}),
    Column("frozen", FLOAT64, {"": cells.first_frozen}),
    Column("tied", FLOAT64, {"": cells.tied}),
    Column(
        "tied, 2 processes",
        FLOAT64,
        {way: functools.partial(cells.tied_apart, layout=layout) for way, layout in TIED.items()},
        WORLD,
    ),
    Column(
        "later",
        FLOAT64,
        {way: functools.partial(cells.later, as_group=group) for way, group in COMES.items()},
    ),
    Column("later, 2 processes", FLOAT64, later_ways(), WORLD),
]


def chosen_columns() -> list[Column]:
    """Return the columns to measure."""
    titles = os.environ.get(TITLES, "").splitlines()
    return [column for column in COLUMNS if not titles or column.title in titles]


def seen_in(case: Any, measure: Callable[[Any], Seen]) -> Seen:
    """Return what was measured, or the reason of a refusal."""
    try:
        return measure(case)
    except RegradError as refusal:
        return {"refused": str(refusal)}


def measures(name: str, column: Column) -> dict[str, Callable[[], Seen]]:
    """Return what is to be measured of a correction in a column, by way, suite and optimizer."""
    found: dict[str, Callable[[], Seen]] = {}
    cases = column.cases(name)
    for way, measure in column.ways.items():
        for which, case in cases.items():
            key = f"{name} | {column.title} | {way} | {which}"
            found[key] = functools.partial(seen_in, case, measure)
    return found


class OnSeveralProcesses:
    """What each of some processes runs: the column in `TITLES`, of the corrections in `NAMES`."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Seen]]:
        """Return every measure of every correction."""
        (column,) = chosen_columns()
        found: dict[str, Callable[[int], Seen]] = {}
        for name in os.environ[NAMES].split():
            for key, measure in measures(name, column).items():
                found[key] = functools.partial(_without_rank, measure)
        return found


def _without_rank(measure: Callable[[], Seen], _: int) -> Seen:
    return measure()
