"""What model, optimizer, corrections and random generators hold, by name and whole: shards gathered and cut again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from regrad import Attachment
from regrad.errors import RegradError
from regrad.sharding import is_sharded, local
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

Shards = dict[str, DTensor]
Change = Callable[[Tensor, DTensor], Tensor]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return whole weights and buffers on the host; of shards on the first process alone. Call it on every process."""
    return get_model_state_dict(model, options=_whole())


def load_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Take back what `model_state` returned on the first process; every process is given the same."""
    set_model_state_dict(model, dict(saved), options=_whole())


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by the parameters' names, whole and on the host. Call it on every process.

    Returns:
        "groups" (each with the names of its parameters) and "state" by name; the state of shards on
        the first process alone.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {
            **{k: v for k, v in group.items() if k != "params"},
            "params": [names[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    # Of an optimizer without state torch first makes one by a step, which corrections would take
    # for one of the run.
    state = (
        get_optimizer_state_dict(model, optimizer, options=_whole()).get("state", {})
        if optimizer.state
        else {}
    )
    return {"groups": groups, "state": state}


def load_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Take back what `optimizer_state` returned, whatever the order of the parameters now.

    torch's `set_optimizer_state_dict` is not used: it steps a fresh optimizer to make its state
    (the attachment's hooks would run), fails on one that has no state, and on parameters that never
    had a gradient.

    Raises:
        RegradError: If a group now holds other parameters than then.
    """
    named = dict(model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    groups, state, count = [], {}, 0
    for index, group in enumerate(optimizer.param_groups):
        here = [names[p] for p in group["params"]]
        old = next((g for g in saved["groups"] if set(g["params"]) == set(here)), None)
        if old is None:
            raise RegradError(
                f"optimizer must have the checkpoint's parameter groups, got others in group {index}"
            )
        for place, name in enumerate(here, count):
            if name in saved["state"]:
                state[place] = {
                    key: _cut(value, named[name]) for key, value in saved["state"][name].items()
                }
        groups.append({**old, "params": list(range(count, count + len(here)))})
        count += len(here)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def corrections_state(attachment: Attachment) -> dict[str, Any]:
    """Return the corrections' state, whole where it has the shape of a sharded parameter. Call it on every process.

    A correction keeps its own part of such a state, under the parameter's name.
    """
    state, shards = attachment.state_dict(), _shards(attachment)
    if not shards:
        return state
    flags: list[bool] = []

    def look(value: Tensor, owner: DTensor) -> Tensor:
        flags.append(is_sharded(value) or value.shape == local(owner).shape)
        return value

    _changed(state["corrections"], shards, look)
    of_all: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_all, flags)
    is_part = iter(
        [all(column) for column in zip(*of_all, strict=True)]
    )  # or else the gathering would hang

    def gather(value: Tensor, owner: DTensor) -> Tensor:
        return _gathered(value, owner) if next(is_part) else value

    return {**state, "corrections": _changed(state["corrections"], shards, gather)}


def load_corrections(attachment: Attachment, saved: Mapping[str, Any]) -> None:
    """Take back what `corrections_state` returned on the first process; every process is given the same.

    Raises:
        RegradError: If corrections, their options or their order differ; says how.
    """
    then, now = saved["receipt"]["order"], [c.name for c in attachment.corrections]
    if then != now and sorted(then) == sorted(now):
        raise RegradError(
            f"corrections must act in the checkpoint's order ({', '.join(then)}), got {', '.join(now)}"
        )
    whole = _changed(saved["corrections"], _shards(attachment), _cut_local)
    attachment.load_state_dict({**saved, "corrections": whole})


def random_state() -> dict[str, Any]:
    """Return every global random state as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take back what `random_state` returned."""
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _shards(attachment: Attachment) -> Shards:
    """Return the sharded parameters by the names under which corrections keep state."""
    step = attachment.engine.step()
    return {
        n: cast(DTensor, p)
        for n, p in zip(step.names, step.parameters, strict=True)
        if is_sharded(p)
    }


def _changed(value: Any, shards: Shards, change: Change, owner: DTensor | None = None) -> Any:
    """Return a copy of nested dictionaries with every tensor at or below a sharded parameter's name changed."""
    if isinstance(value, Mapping):
        return {
            key: _changed(item, shards, change, shards.get(key, owner))
            for key, item in value.items()
        }
    return change(value, owner) if isinstance(value, Tensor) and owner is not None else value


def _gathered(value: Tensor, owner: DTensor) -> Tensor:
    """Return the whole of which every process holds a part, laid out as the parameter is."""
    mesh, placements = owner.device_mesh, owner.placements
    if not is_sharded(value):
        part = value.to(local(owner).device)
        value = DTensor.from_local(part, mesh, placements, shape=owner.shape, stride=owner.stride())
    return cast(DTensor, value).full_tensor().cpu()


def _cut(value: Any, parameter: Tensor) -> Any:
    """Return a copy of a whole tensor laid out as the sharded parameter of its shape; else a copy as it is."""
    if not isinstance(value, Tensor):
        return value
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value.clone()  # the optimizer would step in what was passed
    owner = cast(DTensor, parameter)
    there = value.to(local(owner).device)
    part = distribute_tensor(
        there, owner.device_mesh, owner.placements, src_data_rank=None
    )  # all have the whole
    return part.clone()  # a view would keep the whole in memory


def _cut_local(value: Tensor, owner: DTensor) -> Tensor:
    """Return the part of a whole tensor that this process keeps."""
    return local(_cut(value, owner))
