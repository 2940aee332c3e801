"""Keep the corrections' state in the optimizer's, so that scripts which save it resume exactly."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import FrameType
from typing import Any, Protocol

import torch
from torch import distributed
from torch.optim import Optimizer

from regrad.correction import Correction
from regrad.engine import Engine
from regrad.errors import RegradError, RegradWarning
from regrad.marks import Mark, are_close, mark_of, mark_of_weights
from regrad.optimizers import parameters_of
from regrad.receipt import differences
from regrad.sharding import local

KEY = "regrad"
PARTS = ("corrections", "effects", "receipt")
WITHOUT = (
    "the optimizer's state was loaded without the state of {names}, which starts from scratch: it "
    "was saved without regrad, or in a way that keeps only the optimizer's own values; then save "
    "attachment.state_dict() beside it"
)
ANOTHER = (
    "optimizer state must come from the same corrections; {found}; attach the corrections it was "
    "saved with, or remove the key 'regrad' from {place} to reset the corrections"
)
DAMAGED = (
    "the key 'regrad' of the optimizer's state must hold what regrad saved there, got {got}; "
    "remove it to reset the corrections"
)
ELSEWHERE = (
    "optimizer state must load on every process, but another process refused its part; "
    "see its error"
)
# What a process says to the others in place of the step that its state is of.
NOTHING = -1
REFUSED = -2
# What `torch.load` raises on bytes that `torch.save` did not write.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)


class StateHolder(Protocol):
    """What this file needs from an attachment, see `regrad.Attachment`."""

    optimizer: Optimizer
    corrections: tuple[Correction, ...]
    engine: Engine

    def receipt(self) -> dict[str, Any]:
        """Return what actually happened."""

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class StateInOptimizer:
    """Adds the corrections' state to what the optimizer saves, and restores it from there.

    `state_dict()["regrad"]` is what `Attachment.state_dict` returns; torch ignores the key where
    regrad is missing. `torch.distributed.checkpoint.state_dict`, and an optimizer that is loaded
    before attach, keep nothing but `state` and `param_groups`, so that a packed copy also stands
    in the first group. A few of the optimizer's own values come with it: a packed copy that a
    training without regrad carried along is told from a current one.

    Args:
        attachment: Whose corrections' state it is.
    """

    def __init__(self, attachment: StateHolder) -> None:
        self._attachment = attachment
        self._taken: Mapping[str, Any] | None = None
        self._is_missing = False
        self._applied_then = 0
        # Of a packed copy that only the weights can prove, which may be loaded later.
        self._unproved: Mark | None = None
        self._before: dict[str, Any] = {}

    def register(self, optimizer: Optimizer) -> Iterator[Any]:
        """Put the hooks on the optimizer; yield the handle of each as soon as it is there."""
        yield optimizer.register_state_dict_pre_hook(self._before_saving)
        yield optimizer.register_state_dict_post_hook(self._add)
        yield optimizer.register_load_state_dict_pre_hook(self._take)
        yield optimizer.register_load_state_dict_post_hook(self._give)

    # ---- saving

    def _before_saving(self, _: Optimizer) -> None:
        """Restore the weights where an engine saves them with the optimizer, as they are then."""
        engine = self._attachment.engine
        if engine.layout.own_step is not None:
            engine.before_state_dict()

    def _add(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Add the corrections' state to the optimizer's."""
        if not self._attachment.corrections:
            return
        own = self._attachment.state_dict()
        state[KEY] = own
        if state["param_groups"] and not _is_for_whole_state():
            mark = mark_of(optimizer.state) or self._mark_of_weights()
            state["param_groups"][0][self._group_key()] = _packed({"own": own, "mark": mark})

    def _mark_of_weights(self) -> Mark:
        """Return the mark of the weights, of the true ones where they are moved now."""
        engine = self._attachment.engine
        true = engine.layout.true_weights(engine.window.true_weights)
        parameters = parameters_of(self._attachment.optimizer)
        return mark_of_weights([true.get(parameter, parameter) for parameter in parameters])

    def _group_key(self) -> str:
        """Return the key in the first group; where weights are cut, each process has its own."""
        if self._attachment.engine.is_sharded():
            return f"{KEY}.{distributed.get_rank()}.of.{distributed.get_world_size()}"
        return KEY

    # ---- loading

    def _take(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Take the corrections' state out of what is loaded; refuse another's at once."""
        self._attachment.engine.close_window()
        state, packed = _without_ours(state)
        has_own = KEY in state
        own = state.pop(KEY, None)
        problem = None
        unproved = None
        try:
            if not has_own:
                own, unproved = self._unpacked(packed, state.get("state", {}))
            if own is not None:
                self._refuse_another(own, "the state")
        except RegradError as error:
            problem = error
        self._keep(self._agreed(own, problem), unproved)
        has_optimizers_own = bool(state.get("state") or packed)
        self._note(is_missing=self._taken is None and has_optimizers_own)
        return state

    def _keep(self, own: Mapping[str, Any] | None, unproved: Mark | None) -> None:
        """Keep a state until the optimizer has its own, with the mark that is to be proved."""
        self._taken = own
        self._unproved = None if own is None else unproved

    def take_carried(self, optimizer: Optimizer) -> None:
        """Take the state that an optimizer carries which was loaded before attach.

        Raises:
            RegradError: If it is of other corrections or options, or damaged.
        """
        packed: dict[str, Any] = {}
        for group in optimizer.param_groups:
            packed |= {key: value for key, value in group.items() if _is_ours(key)}
        if not packed or not self._attachment.corrections:
            return
        own, unproved = self._unpacked(packed, optimizer.state)
        if own is not None:
            self._refuse_another(own, "optimizer.param_groups[0]")
        self._keep(self._agreed(own, None), unproved)
        self._note(is_missing=self._taken is None)
        self._give(optimizer)
        take_out(optimizer.param_groups)

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
        own, then = _unpack(packed[self._group_key()])
        now = mark_of(state)
        if then["of_weights"]:
            return (own, then) if now is None else (None, None)
        if now is None or not are_close(then["values"], now["values"]):
            return None, None
        return own, None

    def _refuse_another(self, own: Any, place: str) -> None:
        """Raise unless the state is one of an attachment with the same corrections."""
        problem = form_problem(own)
        if problem:
            raise RegradError(DAMAGED.format(got=problem))
        found = "; ".join(differences(own["receipt"], self._attachment.receipt()))
        if found:
            raise RegradError(ANOTHER.format(found=found, place=place))

    def _agreed(self, own: Any, problem: RegradError | None) -> Any:
        """Return the state if every process has one from the same step, else None.

        Shards must be loaded on every process: a part of the processes with state and a part
        without would part ways.

        Raises:
            RegradError: `problem`, or that another process refused its part.
        """
        if self._attachment.engine.is_sharded():
            lowest, highest = self._bounds_of_steps(own, problem)
            if lowest == REFUSED and problem is None:
                raise RegradError(ELSEWHERE)
            if lowest != highest:
                own = None
        if problem is not None:
            raise problem
        return own

    def _bounds_of_steps(self, own: Any, problem: RegradError | None) -> tuple[int, int]:
        """Return the lowest and the highest step that the processes have a state of."""
        if own is None:
            steps = NOTHING
        elif problem is not None:
            steps = REFUSED
        else:
            steps = int(own["receipt"]["steps_applied"])
        device = local(self._attachment.engine.step().parameters[0]).device
        bounds = torch.tensor([steps, -steps], device=device)
        distributed.all_reduce(bounds, distributed.ReduceOp.MIN)
        return int(bounds[0]), -int(bounds[1])

    def _give(self, _: Optimizer) -> None:
        """Give the corrections their state, now that the optimizer has its own."""
        taken = self._taken
        self._taken = None
        if taken is None:
            return
        unproved = self._unproved
        if unproved is not None:
            self._before = copy.deepcopy(self._attachment.state_dict())
        self._attachment.load_state_dict(taken)
        # Loading took the mark away, see `is_there`.
        self._unproved = unproved
        self._attachment.engine.before_use = None if unproved is None else self._prove

    def _prove(self) -> None:
        """Restore a state that is not of these weights, at the first use after a load."""
        self._attachment.engine.before_use = None
        then = self._unproved
        before = self._before
        self._unproved = None
        self._before = {}
        if then is None:
            return
        own = None
        self._attachment.engine.layout.moments(self._attachment.optimizer)
        if mark_of_weights(parameters_of(self._attachment.optimizer)) == then:
            own = self._attachment.state_dict()
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
        if _asks_for_whole_state(frame):
            return True
        frame = frame.f_back
    return False


def _asks_for_whole_state(frame: FrameType) -> bool:
    """Say whether a frame is one of torch's checkpointing that loads, or gathers all shards."""
    if frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        return False
    if frame.f_code.co_name == "_load_optim_state_dict":
        return True
    return bool(getattr(frame.f_locals.get("info"), "full_state_dict", False))


def carries(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether an optimizer's groups hold packed copies, as after a load before attach."""
    return any(_is_ours(key) for key in chain.from_iterable(groups))


def take_out(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Remove the packed copies from an optimizer's groups, so that the corrections start afresh.

    Args:
        groups: Of an optimizer, or of its state_dict. Overwritten.

    Returns:
        What was removed, by key.
    """
    found: dict[str, Any] = {}
    for group in groups:
        ours = [key for key in group if _is_ours(key)]
        for key in ours:
            found[key] = group.pop(key)
    return found


def _without_ours(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a copy of an optimizer's state_dict without the packed copies, and these by key."""
    copied = dict(state)
    groups = [dict(group) for group in state.get("param_groups", ())]
    packed = take_out(groups)
    if "param_groups" in state:
        copied["param_groups"] = groups
    return copied, packed


def form_problem(own: Any) -> str | None:
    """Return why a value is not a state from `Attachment.state_dict`, or None."""
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
            return "a receipt with something other than corrections and their options"
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
    """Return what torch saves of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _unpack(packed: Any) -> tuple[Any, Mark]:
    """Return the state in a packed copy, and the mark beside it.

    Raises:
        RegradError: If it is damaged.
    """
    try:
        carried = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        mark = carried["mark"]
        then = Mark(of_weights=mark["of_weights"], values=sorted(mark["values"]))
        return carried["own"], then
    except UNREADABLE as error:
        raise RegradError(DAMAGED.format(got="a damaged packed copy")) from error
