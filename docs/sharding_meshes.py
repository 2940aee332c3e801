"""Columns on meshes, of stages and of experts, on the models and trials of tests/mesh_layouts.py.

The suites' models have nothing to be cut for these, so the models are those of the tests.
"""

import functools
from collections.abc import Callable
from typing import Any

from corrections_table import ROOT
from regrad_testing.clauses import difference
from regrad_testing.files import load_file
from regrad_testing.worker import WORLD
from sharding_cells import FLOAT64, Column, Seen
from torch import distributed
from torch.distributed.tensor.parallel import loss_parallel

meshes = load_file(ROOT / "tests" / "mesh_layouts.py", "regrad_mesh_layouts")

REFUSED = {
    "gcode": "gcode:warmup_steps=1,stages=[0,1]",
    "gcgd": "gcgd:gcw.warmup_steps=1,gcode.warmup_steps=1",
    "adafisher": "adafisher",
    "int8-rows": "int8-rows",
}
"""Corrections that no trial of the tests has, because all or some of these layouts refuse them."""
OF_STAGES = {"gcw": "gcw:warmup_steps=1"}
"""Corrections with options by which they look for stages in the whole model."""


def trials_of(name: str) -> dict[str, Any]:
    """Return the trials of a correction, by name."""
    found = {
        key: trial
        for key, trial in meshes.TRIALS.items()
        if (trial.spec or "").partition(":")[0] == name
    }
    if name in REFUSED:
        found[name] = meshes.Trial(REFUSED[name], meshes.momentum)
    return found


def trials_in_parts(name: str) -> dict[str, Any]:
    """Return those, and the trials that only a model in parts refuses."""
    found = trials_of(name)
    if name in OF_STAGES:
        found[f"{name} of stages"] = meshes.Trial(OF_STAGES[name], meshes.momentum)
    return found


def on_mesh(trial: Any, layout: Any) -> Seen:
    """A model laid out on a mesh, against one process."""
    seen = meshes.weights_after(trial, meshes.Net, layout)
    wanted = meshes.weights_after(trial, meshes.Net, None)
    return {"far": difference(wanted, seen)[0]}


def with_classes_in_parts(trial: Any) -> Seen:
    """A head whose outputs are cut by classes, in torch's context for such logits."""
    with loss_parallel():
        return on_mesh(trial, meshes.head_in_parts)


def in_pipeline(trial: Any, make_parts: Any, *, is_summed: bool, **how: Any) -> Seen:
    """Stages of a model, against one process."""
    group = distributed.group.WORLD if is_summed else None
    rank = distributed.get_rank()
    return {"far": meshes.farthest_in_parts(trial, make_parts, rank, group, **how)}


def with_experts(trial: Any) -> Seen:
    """Experts beside copies of everything else, against one process."""
    return {"far": meshes.farthest_expert(trial, distributed.get_rank())}


def on_meshes(title: str, processes: int, *layouts: Any) -> Column:
    """Return the column of some layouts."""
    ways = {
        layout.__name__.replace("_", " "): functools.partial(on_mesh, layout=layout)
        for layout in layouts
    }
    return Column(title, FLOAT64, ways, processes, trials_of)


def of_pipelines(title: str, *, is_summed: bool) -> Column:
    """Return the column of stages, with or without the group that holds all of them."""
    ways: dict[str, Callable[[Any], Seen]] = {
        make_parts.__name__.replace("_", " "): functools.partial(
            in_pipeline, make_parts=make_parts, is_summed=is_summed
        )
        for make_parts in (meshes.gpipe, meshes.one_forward_one_backward)
    }
    ways["interleaved"] = functools.partial(
        in_pipeline, make_parts=meshes.interleaved, is_summed=is_summed, together=True
    )
    return Column(title, FLOAT64, ways, WORLD, trials_in_parts)


COLUMNS = [
    Column(
        "tensor parallel",
        FLOAT64,
        {
            "": functools.partial(on_mesh, layout=meshes.tensor_parallel),
            "classes in parts": with_classes_in_parts,
        },
        WORLD,
        trials_of,
    ),
    on_meshes("sequence parallel", WORLD, meshes.sequence_parallel),
    on_meshes("FSDP2 + tensor parallel", 4, meshes.two_dimensional),
    on_meshes("HSDP + tensor parallel", 4, meshes.two_copies, meshes.two_shards),
    of_pipelines("pipeline", is_summed=False),
    of_pipelines("pipeline, `model_group=`", is_summed=True),
    Column("experts", FLOAT64, {"": with_experts}, WORLD, trials_in_parts),
]
