"""What a window keeps of a parameter from step to step, and what a checkpoint holds of it."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrad.samples import sample
from regrad.sharding import local, with_part


class Holds(enum.Enum):
    """What a buffer holds.

    Attributes:
        NOTHING: Nothing useful.
        TRUE: The weights from which the next update starts.
        BEFORE: The weights before the last update.
        AHEAD: Where the weights were moved for a forward pass that may come again.
    """

    NOTHING = enum.auto()
    TRUE = enum.auto()
    BEFORE = enum.auto()
    AHEAD = enum.auto()


@dataclass(eq=False)
class Kept:
    """The buffer of one parameter.

    Attributes:
        parameter: The parameter.
        tensor: Like its local part.
        holds: What it holds.
        is_followed: Whether a `LastStep` was requested last.
        is_corrected: Whether corrections change what the optimizer does to the parameter.
        has_gradient: Whether the parameter had a gradient in the step under way.
        writes: How often it was written before that step.
    """

    parameter: Tensor
    tensor: Tensor
    holds: Holds = Holds.NOTHING
    is_followed: bool = False
    is_corrected: bool = False
    has_gradient: bool = False
    writes: int = -1

    @property
    def live(self) -> Tensor:
        """The local part of the parameter as it is now."""
        return local(self.parameter)

    @functools.cached_property
    def as_parameter(self) -> Tensor:
        """The buffer as a tensor of the parameter's kind: a shard where that is one."""
        return with_part(self.parameter, self.tensor)

    def begin_step(self) -> None:
        """Note that the optimizer steps the parameter from the weights in the buffer."""
        self.holds = Holds.TRUE
        self.writes = self.live._version
        self.has_gradient = self.parameter.grad is not None

    def was_stepped(self) -> bool:
        """Say whether the optimizer stepped the parameter: it had a gradient, or was written."""
        return self.has_gradient or self.live._version != self.writes

    def fits(self, part: Tensor) -> bool:
        """Say whether the buffer is like the local part of a parameter."""
        own = self.tensor
        if (own.shape, own.dtype, own.device) != (part.shape, part.dtype, part.device):
            return False
        return own.stride() == part.stride() or own.is_contiguous()


@dataclass(eq=False)
class Loaded:
    """A buffer's content in a checkpoint.

    Attributes:
        holds: `Holds.BEFORE` or `Holds.AHEAD`.
        tensor: The content, of the parameter's local shape.
        beside: A sample of the weights that it belongs to; None if there is none.
    """

    holds: Holds
    tensor: Tensor
    beside: Tensor | None

    def write(self, state: dict[str, Any], name: str) -> None:
        """Put it into a window's state under the name of its parameter."""
        state[_place(self.holds)][name] = self.tensor
        if self.beside is not None:
            state["beside"][name] = self.beside

    def is_of(self, part: Tensor) -> bool:
        """Say whether it belongs to the weights that a parameter has. May wait for the device."""
        if self.tensor.shape != part.shape:
            return False
        if self.beside is None:
            return True
        now = sample(part)
        return torch.equal(self.beside.to(now.device, now.dtype), now)


def loaded_from(state: Mapping[str, Any], name: str) -> Loaded | None:
    """Return what a window's state has under a name, or None."""
    for holds in (Holds.BEFORE, Holds.AHEAD):
        tensor = state.get(_place(holds), {}).get(name)
        if tensor is not None:
            return Loaded(holds, tensor.clone(), state["beside"].get(name))
    return None


def _place(holds: Holds) -> str:
    """Return the key of a content in a window's state."""
    return holds.name.lower()
