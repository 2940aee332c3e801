"""The corrections' state rides in the optimizer's state_dict: a script that saves that resumes exactly."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from regrad.correction import Correction
from regrad.errors import RegradError, RegradWarning
from regrad.receipt import differences
from regrad.sharding import local

if TYPE_CHECKING:
    from regrad.attachment import Attachment

KEY = "regrad"
WITHOUT = (
    "the optimizer's state was loaded without the state of {names}, which starts anew: it was "
    "saved without regrad, or by a way that keeps nothing but the optimizer's own values; save "
    "attachment.state_dict() beside it there"
)


class StateInOptimizer:
    """Adds the corrections' state to what the optimizer saves, and takes it back when that is loaded.

    `state_dict()["regrad"]` is what `Attachment.state_dict` returns; torch ignores the key where
    regrad is missing. `torch.distributed.checkpoint.state_dict` keeps nothing but `state` and
    `param_groups`, so that a packed copy also stands in the first group. Values of the first
    tensors of the optimizer's state come with it: a packed copy that a training without regrad
    carried along is told from a current one.

    Args:
        attachment: Whose corrections' state it is.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._taken: Mapping[str, Any] | None = None
        self._is_missing = False

    def register(self, optimizer: Optimizer) -> Iterator[Any]:
        """Put the hooks on the optimizer; yield the handle of each as soon as it is there."""
        yield optimizer.register_state_dict_post_hook(self._add)
        yield optimizer.register_load_state_dict_pre_hook(self._take)
        yield optimizer.register_load_state_dict_post_hook(self._give)

    def _add(self, _: Optimizer, state: dict[str, Any]) -> None:
        """Add the corrections' state to the optimizer's."""
        if not self._attachment.corrections:
            return
        own = self._attachment.state_dict()
        state[KEY] = own
        keeps_state = any(_keeps_state(c) for c in self._attachment.corrections)
        if keeps_state and state["param_groups"]:
            mark = _mark_of(state["state"])
            state["param_groups"][0][self._group_key()] = _packed({"own": own, "mark": mark})

    def _group_key(self) -> str:
        """Return the key in the first group: every process has parts of its own where weights are sharded."""
        if self._attachment.engine.is_sharded():
            return f"{KEY}.{distributed.get_rank()}.of.{distributed.get_world_size()}"
        return KEY

    def _take(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Take the corrections' state out of what is loaded; refuse another's before anything changes."""
        self._attachment.engine.close_window()
        state = dict(state)
        own = state.pop(KEY, None)
        groups = [dict(group) for group in state.get("param_groups", ())]
        packed = groups[0].get(self._group_key()) if groups else None
        for group in groups:
            for key in [key for key in group if str(key).split(".")[0] == KEY]:
                del group[key]
        if "param_groups" in state:
            state["param_groups"] = groups
        if own is None and isinstance(packed, bytes):
            carried = _unpacked(packed)
            if carried["mark"] == _mark_of(state["state"]):
                own = carried["own"]
        if own is not None:
            self._refuse_another(own)
        self._taken = own
        self._is_missing = own is None and bool(state.get("state"))
        return state

    def _refuse_another(self, own: Mapping[str, Any]) -> None:
        """Raise unless the state comes from the same corrections."""
        found = "; ".join(differences(own["receipt"], self._attachment.receipt()))
        if found:
            raise RegradError(
                f"optimizer state must come from the same corrections; {found}; attach as it was "
                f"saved, or remove the key {KEY!r} from the state to start the corrections anew"
            )

    def _give(self, _: Optimizer) -> None:
        """Give the corrections their state, now that the optimizer has its own."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._attachment.load_state_dict(taken)

    def is_there(self) -> None:
        """Note that the corrections got their state in another way."""
        self._is_missing = False

    def warn_if_missing(self) -> None:
        """Warn, after a step, if the optimizer's state came alone and a correction keeps state."""
        if not self._is_missing:
            return
        self._is_missing = False
        losing = [c.name for c in self._attachment.corrections if _has_values(c.state_dict())]
        if losing:
            names = ", ".join(map(repr, losing))
            warnings.warn(WITHOUT.format(names=names), RegradWarning, stacklevel=2)


def _keeps_state(correction: Correction) -> bool:
    """Say whether a correction has state at all."""
    return type(correction).state_dict is not Correction.state_dict


def _has_values(state: Any) -> bool:
    """Say whether nested mappings hold any value."""
    if isinstance(state, Mapping):
        return any(_has_values(value) for value in state.values())
    return True


def _packed(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _unpacked(packed: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return loaded


def _mark_of(state: Mapping[Any, Any]) -> list[float]:
    """Return the first value of each tensor of an optimizer's state, sorted: names and order may change."""
    tensors = [
        local(value)
        for of_parameter in state.values()
        if isinstance(of_parameter, Mapping)
        for value in of_parameter.values()
        if isinstance(value, Tensor) and local(value).numel()
    ]
    return sorted(float(tensor.flatten()[0].real.nan_to_num()) for tensor in tensors)
