"""The corrections' state rides in the optimizer's state_dict: a script that saves that resumes exactly."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from regrad.correction import Correction
from regrad.engine import Engine
from regrad.errors import RegradError, RegradWarning
from regrad.receipt import differences
from regrad.sharding import local

KEY = "regrad"
PARTS = ("corrections", "effects", "receipt")
WITHOUT = (
    "the optimizer's state was loaded without the state of {names}, which starts anew: it was "
    "saved without regrad, or by a way that keeps nothing but the optimizer's own values; save "
    "attachment.state_dict() beside it there"
)
ANOTHER = (
    "optimizer state must come from the same corrections; {found}; attach as it was saved, or "
    "remove the key 'regrad' from {place} to start the corrections anew"
)
DAMAGED = (
    "the key 'regrad' of the optimizer's state must hold what regrad saved there, got {got}; "
    "remove it to start the corrections anew"
)
ELSEWHERE = (
    "optimizer state must be loaded on every process alike, another process refused its part; "
    "see its error"
)
NOTHING = -1
REFUSED = -2


UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)


class Mark(TypedDict):
    """Values by which an optimizer is known again.

    Attributes:
        of_weights: Whether they are of the weights, for want of tensors in its state.
        values: Sorted.
    """

    of_weights: bool
    values: list[float]


class Attached(Protocol):
    """What this file needs of an attachment, see `regrad.Attachment`."""

    optimizer: Optimizer
    corrections: tuple[Correction, ...]
    engine: Engine

    def receipt(self) -> dict[str, Any]:
        """Return what really happened."""

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class StateInOptimizer:
    """Adds the corrections' state to what the optimizer saves, and takes it back when that is loaded.

    `state_dict()["regrad"]` is what `Attachment.state_dict` returns; torch ignores the key where
    regrad is missing. `torch.distributed.checkpoint.state_dict`, and an optimizer that is loaded
    before attach, keep nothing but `state` and `param_groups`, so that a packed copy also stands
    in the first group. A few of the optimizer's own values come with it: a packed copy that a
    training without regrad carried along is told from a current one.

    Args:
        attachment: Whose corrections' state it is.
    """

    def __init__(self, attachment: Attached) -> None:
        self._attachment = attachment
        self._taken: Mapping[str, Any] | None = None
        self._is_missing = False
        self._applied_then = 0
        # Of a packed copy that only the weights can prove, which may be loaded later.
        self._unproved: Mark | None = None
        self._before: dict[str, Any] = {}

    def register(self, optimizer: Optimizer) -> Iterator[Any]:
        """Put the hooks on the optimizer; yield the handle of each as soon as it is there."""
        yield optimizer.register_state_dict_post_hook(self._add)
        yield optimizer.register_load_state_dict_pre_hook(self._take)
        yield optimizer.register_load_state_dict_post_hook(self._give)

    # ---- saving

    def _add(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Add the corrections' state to the optimizer's."""
        if not self._attachment.corrections:
            return
        own = self._attachment.state_dict()
        state[KEY] = own
        if state["param_groups"] and not _is_for_whole_state():
            true = self._attachment.engine.window.true_weights()
            mark = mark_of(optimizer.state) or mark_of_weights(_parameters(optimizer, true))
            state["param_groups"][0][self._group_key()] = _packed({"own": own, "mark": mark})

    def _group_key(self) -> str:
        """Return the key in the first group: every process has parts of its own where weights are sharded."""
        if self._attachment.engine.is_sharded():
            return f"{KEY}.{distributed.get_rank()}.of.{distributed.get_world_size()}"
        return KEY

    # ---- loading

    def _take(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Take the corrections' state out of what is loaded; refuse another's before anything changes."""
        self._attachment.engine.close_window()
        state = dict(state)
        has_own = KEY in state
        own = state.pop(KEY, None)
        groups = [dict(group) for group in state.get("param_groups", ())]
        packed = take_out(groups)
        if "param_groups" in state:
            state["param_groups"] = groups
        problem = None
        unproved = None
        try:
            if not has_own:
                own, unproved = self._unpacked(packed, state.get("state", {}))
            if own is not None:
                self._refuse_another(own, "the state")
        except RegradError as error:
            problem = error
        self._taken = self._agreed(own, problem)
        self._unproved = unproved if self._taken is not None else None
        self._note(is_missing=self._taken is None and bool(state.get("state") or packed))
        return state

    def take_carried(self, optimizer: Optimizer) -> None:
        """Take the state that an optimizer carries which was loaded before attach.

        Raises:
            RegradError: If it is of other corrections or options, or damaged.
        """
        groups = optimizer.param_groups
        packed = {key: value for group in groups for key, value in group.items() if _is_ours(key)}
        if not packed or not self._attachment.corrections:
            return
        own, unproved = self._unpacked(packed, optimizer.state)
        if own is not None:
            self._refuse_another(own, "optimizer.param_groups[0]")
        self._taken = self._agreed(own, None)
        self._unproved = unproved if self._taken is not None else None
        self._note(is_missing=self._taken is None)
        self._give(optimizer)
        take_out(groups)

    def _unpacked(
        self, packed: Mapping[str, Any], state: Mapping[Any, Any]
    ) -> tuple[Any, Mark | None]:
        """Return the state in this process's packed copy, and the mark that is still to be proved.

        Args:
            packed: The packed copies, by key.
            state: Of the optimizer, as it is or will be loaded.

        Returns:
            (None, None) where there is no copy or one that is out of date.
        """
        if self._group_key() not in packed:
            return None, None
        try:
            file = io.BytesIO(packed[self._group_key()])
            carried = torch.load(file, map_location="cpu", weights_only=True)
            own, mark = carried["own"], carried["mark"]
            then = Mark(of_weights=mark["of_weights"], values=sorted(mark["values"]))
        except UNREADABLE as error:
            raise RegradError(DAMAGED.format(got="a damaged packed copy")) from error
        if then["of_weights"]:
            return (own, then) if mark_of(state) is None else (None, None)
        now = mark_of(state)
        is_current = now is not None and _are_close(then["values"], now["values"])
        return (own, None) if is_current else (None, None)

    def _refuse_another(self, own: Any, place: str) -> None:
        """Raise unless the state is one of an attachment with the same corrections."""
        problem = form_problem(own)
        if problem:
            raise RegradError(DAMAGED.format(got=problem))
        found = "; ".join(differences(own["receipt"], self._attachment.receipt()))
        if found:
            raise RegradError(ANOTHER.format(found=found, place=place))

    def _agreed(self, own: Any, problem: RegradError | None) -> Any:
        """Return the state if every process has one of the same step, else None; raise what was refused.

        Shards must be loaded on every process: a part of the processes with state and a part
        without would part ways.
        """
        engine = self._attachment.engine
        if engine.is_sharded():
            steps = NOTHING if own is None else REFUSED
            if own is not None and problem is None:
                steps = int(own["receipt"]["steps_applied"])
            device = local(engine.step().parameters[0]).device
            bounds = torch.tensor([steps, -steps], device=device)
            distributed.all_reduce(bounds, distributed.ReduceOp.MIN)
            lowest, highest = int(bounds[0]), -int(bounds[1])
            if lowest == REFUSED and problem is None:
                raise RegradError(ELSEWHERE)
            if lowest != highest:
                own = None
        if problem is not None:
            raise problem
        return own

    def _give(self, _: Optimizer) -> None:
        """Give the corrections their state, now that the optimizer has its own."""
        taken, self._taken = self._taken, None
        unproved = self._unproved
        if taken is None:
            return
        if unproved is not None:
            self._before = copy.deepcopy(self._attachment.state_dict())
        self._attachment.load_state_dict(taken)
        self._unproved = unproved
        self._attachment.engine.before_use = self._prove if unproved is not None else None

    def _prove(self) -> None:
        """Before the first forward or step after a load, take back a state that is not of these weights."""
        self._attachment.engine.before_use = None
        then, self._unproved = self._unproved, None
        before, self._before = self._before, {}
        if then is None:
            return
        now = mark_of_weights(_parameters(self._attachment.optimizer, {}))
        own = self._attachment.state_dict() if now == then else None
        if self._agreed(own, None) is None:
            self._attachment.load_state_dict(before)
            self._note(is_missing=True)

    # ---- what is missing

    def _note(self, *, is_missing: bool) -> None:
        self._is_missing = is_missing
        self._applied_then = self._attachment.engine.applied

    def is_there(self) -> None:
        """Note that the corrections got their state in another way."""
        self._is_missing = False
        self._unproved = None

    def warn_if_missing(self) -> None:
        """Warn, after a step, if the optimizer's state came alone and a correction keeps state."""
        if not self._is_missing or self._attachment.engine.applied == self._applied_then:
            return
        self._is_missing = False
        losing = [c.name for c in self._attachment.corrections if _has_values(c.state_dict())]
        if losing:
            names = ", ".join(map(repr, losing))
            warnings.warn(WITHOUT.format(names=names), RegradWarning, stacklevel=2)


def _is_for_whole_state() -> bool:
    """Say whether torch's checkpointing asks for a state that any process of any layout can load.

    There a key that only some processes have, or that only the one with the file knows, is an
    error of torch's own `broadcast_from_rank0`, with regrad and without it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            is_to_load = frame.f_code.co_name == "_load_optim_state_dict"
            if is_to_load or getattr(frame.f_locals.get("info"), "full_state_dict", False):
                return True
        frame = frame.f_back
    return False


def carries(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether an optimizer's groups hold packed copies, as after a load before attach."""
    return any(_is_ours(key) for group in groups for key in group)


def take_out(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Remove the packed copies from an optimizer's groups, so that the corrections start anew.

    Args:
        groups: Of an optimizer, or of its state_dict. Overwritten.

    Returns:
        What was removed, by key.
    """
    found: dict[str, Any] = {}
    for group in groups:
        for key in [key for key in group if _is_ours(key)]:
            found[key] = group.pop(key)
    return found


def form_problem(own: Any) -> str | None:
    """Return what keeps a value from being a state of `Attachment.state_dict`, or None."""
    if not isinstance(own, Mapping):
        return f"a {type(own).__name__}"
    lacking = [part for part in PARTS if not isinstance(own.get(part), Mapping)]
    if lacking:
        return f"one without {', '.join(map(repr, lacking))}"
    receipt = own["receipt"]
    counts = [receipt.get(key) for key in ("steps_applied", "steps_skipped")]
    rows = receipt.get("corrections")
    if not all(isinstance(count, int) for count in counts) or not isinstance(rows, list):
        return "a receipt without counts of steps and corrections"
    for row in rows:
        is_row = isinstance(row, Mapping) and isinstance(row.get("options"), Mapping)
        if not is_row or not isinstance(row.get("name"), str):
            return "a receipt with something else than corrections and their options"
    return None


def _is_ours(key: Any) -> bool:
    """Say whether a key of a group is one of a packed copy."""
    return isinstance(key, str) and key.split(".")[0] == KEY


def _has_values(state: Any) -> bool:
    """Say whether nested mappings hold any value."""
    if isinstance(state, Mapping):
        return any(_has_values(value) for value in state.values())
    return True


def _packed(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _parameters(optimizer: Optimizer, true: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """Return the weights of an optimizer, with the true ones of those that are moved now."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [true.get(parameter, parameter) for parameter in held]


def mark_of(state: Mapping[Any, Any]) -> Mark | None:
    """Return the first values of the tensors of an optimizer's state; None where it has no tensor."""
    tensors = [
        value
        for of_parameter in state.values()
        if isinstance(of_parameter, Mapping)
        for value in of_parameter.values()
        if isinstance(value, Tensor)
    ]
    return Mark(of_weights=False, values=_first_values(tensors)) if tensors else None


def mark_of_weights(weights: Sequence[Tensor]) -> Mark:
    """Return the first values of weights, which tell an optimizer's state that has no tensor."""
    return Mark(of_weights=True, values=_first_values(weights))


def _first_values(tensors: Sequence[Tensor]) -> list[float]:
    """Return the first value of each tensor, sorted: names and order may change."""
    parts = [local(tensor.detach()) for tensor in tensors]
    firsts = [part.flatten()[0].real for part in parts if _is_readable(part)]
    by_device: dict[torch.device, list[Tensor]] = {}
    for first in firsts:
        by_device.setdefault(first.device, []).append(first.to(torch.float32))
    values = [value for group in by_device.values() for value in torch.stack(group).tolist()]
    return sorted(0.0 if math.isnan(value) else value for value in values)


def _is_readable(part: Tensor) -> bool:
    """Say whether a tensor has a first value: quantised states of other libraries are none of torch's own."""
    return type(part) is Tensor and part.layout is torch.strided and part.numel() > 0


def _are_close(then: Sequence[float], now: Sequence[float]) -> bool:
    """Say whether values are equal but for the rounding to a parameter's type, which loading does."""
    if len(then) != len(now):
        return False
    pairs = zip(then, now, strict=True)
    return all(math.isclose(one, other, rel_tol=0.01, abs_tol=1e-7) for one, other in pairs)
