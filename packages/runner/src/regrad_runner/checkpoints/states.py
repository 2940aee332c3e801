"""What model, optimizer, corrections and random generators hold, by name and whole.

Shards are gathered where states are saved, and cut again where they are loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from regrad import Attachment, devices
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
# The parts of an attachment's state that hold tensors by the name of their parameter.
BY_NAME = ("corrections", "window")


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return whole weights and buffers on the host.

    Call it on every process. Of a sharded model the first one alone has them.
    """
    return get_model_state_dict(model, options=_whole())


def load_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load what `model_state` returned on the first process, on every process alike."""
    set_model_state_dict(model, dict(saved), options=_whole())


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by the parameters' names, whole and on the host.

    Call it on every process.

    Returns:
        "groups" (each with the names of its parameters) and "state" by name; the state of shards on
        the first process alone.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    # For an optimizer without state torch first creates one by a step, which corrections would take
    # for a step of the run.
    if not optimizer.state:
        return {"groups": groups, "state": {}}
    found = get_optimizer_state_dict(model, optimizer, options=_whole())
    return {"groups": groups, "state": found.get("state", {})}


def load_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned, whatever the present order of the parameters.

    torch's `set_optimizer_state_dict` is not used: it steps a fresh optimizer to make its state
    (the attachment's hooks would run), fails on one that has no state, and on parameters that never
    had a gradient.

    Raises:
        RegradError: If a group now holds other parameters than then.
    """
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Any]] = {}  # by the parameters' numbers, as torch wants it
    count = 0
    for index, group in enumerate(optimizer.param_groups):
        here = [names[parameter] for parameter in group["params"]]
        old = group_of_names(saved["groups"], set(here))
        if old is None:
            raise RegradError(
                "optimizer must have the checkpoint's parameter groups, got different ones in "
                f"group {index}"
            )
        numbers = list(range(count, count + len(here)))
        count += len(here)
        groups.append({**old, "params": numbers})
        for number, name in zip(numbers, here, strict=True):
            if name in saved["state"]:
                of_parameter = saved["state"][name].items()
                state[number] = {key: _cut(value, parameters[name]) for key, value in of_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def group_of_names(groups: Any, names: set[str]) -> Any:
    """Return which of the saved parameter groups has exactly these parameters; None if none has."""
    for group in groups:
        if set(group["params"]) == names:
            return group
    return None


def corrections_state(attachment: Attachment) -> dict[str, Any]:
    """Return the corrections' state, whole where it has the shape of a sharded parameter.

    A correction keeps its own part of such a state, under the parameter's name, and so does the
    window. Call it on every process.
    """
    state = attachment.state_dict()
    by_name = {key: state[key] for key in BY_NAME}
    shards = _shards(attachment)
    if not shards:
        return state
    own_flags: list[bool] = []

    def look(value: Tensor, owner: DTensor) -> Tensor:
        own_flags.append(is_sharded(value) or value.shape == local(owner).shape)
        return value

    _changed(by_name, shards, look)
    of_all: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_all, own_flags)
    # Gather only what every process considers a part, or they would wait for each other.
    is_part = iter([all(flags) for flags in zip(*of_all, strict=True)])

    def gather(value: Tensor, owner: DTensor) -> Tensor:
        return _gathered(value, owner) if next(is_part) else value

    return {**state, **_changed(by_name, shards, gather)}


def load_corrections(attachment: Attachment, saved: Mapping[str, Any]) -> None:
    """Load what `corrections_state` returned on the first process.

    Give every process the same.

    Raises:
        RegradError: If corrections, their options or their order differ; says how.
    """
    check_order(attachment, saved["receipt"])
    by_name = {key: saved.get(key, {}) for key in BY_NAME}
    attachment.load_state_dict({**saved, **_changed(by_name, _shards(attachment), _cut_local)})


def check_order(attachment: Attachment, receipt: Mapping[str, Any]) -> None:
    """Raise a `RegradError` if the same corrections act in another order than in a receipt."""
    then = receipt["order"]
    now = [correction.name for correction in attachment.corrections]
    if then != now and sorted(then) == sorted(now):
        raise RegradError(
            f"corrections must act in the checkpoint's order ({', '.join(then)}), "
            f"got {', '.join(now)}"
        )


def random_state() -> dict[str, Any]:
    """Return every global random state as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    numpy_keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), numpy_keys, position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    accelerator = devices.accelerator()
    if accelerator is not None:
        state[accelerator] = devices.random_state(torch.device(accelerator))
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    numpy_keys = keys.numpy().astype(np.uint32)
    np.random.set_state((kind, numpy_keys, position, has_gauss, cached))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
    accelerator = devices.accelerator()
    if accelerator is not None and accelerator in state:
        devices.set_random_state(torch.device(accelerator), state[accelerator])


def _whole() -> StateDictOptions:
    """Return what makes torch gather shards, on the host of the first process."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _shards(attachment: Attachment) -> Shards:
    """Return the sharded parameters by the names under which corrections keep state."""
    step = attachment.engine.step()
    named = zip(step.names, step.parameters, strict=True)
    return {name: cast(DTensor, parameter) for name, parameter in named if is_sharded(parameter)}


def _changed(value: Any, shards: Shards, change: Change, owner: DTensor | None = None) -> Any:
    """Return a copy of nested dictionaries in which the tensors of sharded parameters are changed.

    These are the tensors at or below the name of such a parameter, their owner.
    """
    if isinstance(value, Mapping):
        return {
            key: _changed(item, shards, change, shards.get(key, owner))
            for key, item in value.items()
        }
    if isinstance(value, Tensor) and owner is not None:
        return change(value, owner)
    return value


def _gathered(value: Tensor, owner: DTensor) -> Tensor:
    """Return the whole of which every process holds a part, laid out as the parameter is."""
    if not is_sharded(value):
        value = DTensor.from_local(
            value.to(local(owner).device),
            owner.device_mesh,
            owner.placements,
            shape=owner.shape,
            stride=owner.stride(),
        )
    return cast(DTensor, value).full_tensor().cpu()


def _cut(value: Any, parameter: Tensor) -> Any:
    """Return a copy of a tensor, cut as the parameter is if that is sharded and of its shape."""
    if not isinstance(value, Tensor):
        return value
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value.clone()  # the optimizer would change what was passed
    owner = cast(DTensor, parameter)
    whole = value.to(local(owner).device)
    # No process needs to send it, since all have the whole.
    part = distribute_tensor(whole, owner.device_mesh, owner.placements, src_data_rank=None)
    return part.clone()  # a view would keep the whole in memory


def _cut_local(value: Tensor, owner: DTensor) -> Tensor:
    """Return the part of a whole tensor that this process keeps."""
    return local(_cut(value, owner))
