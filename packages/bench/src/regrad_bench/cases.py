"""A case of the benchmark: two sides, how they are built, and what must hold between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import regrad
import torch
from regrad import Attachment, Correction
from regrad.devices import accelerator
from torch import nn
from torch.optim import Optimizer

# The effect meter looks at the first 20 steps, at 20 after a warm-up and at every 50th.
BEYOND_THE_METER = 101


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device and size.

    Attributes:
        device: Where everything lies.
        quick: Small sizes, to see that everything runs; the numbers of such a run mean nothing.
    """

    device: torch.device
    quick: bool = False


def devices_of(name: str) -> list[torch.device]:
    """Return the devices of a name.

    Args:
        name: "cpu", the type of the accelerator, or "all" for both. Without an accelerator
            "cuda" is taken for one, of which nothing is measured then.

    Raises:
        ValueError: If it is another name.
    """
    there = accelerator() or "cuda"
    if name == "all":
        return [torch.device("cpu"), torch.device(there)]
    if name not in ("cpu", there):
        raise ValueError(f"device must be one of all, cpu, {there}, got {name!r}")
    return [torch.device(name)]


@dataclass(kw_only=True)
class Pair:
    """Both sides, ready to be called.

    Attributes:
        ours: One call of our side.
        peer: One call of the other side.
        prepare: Called before each timed call, not timed.
        difference: Returns the largest relative difference between what the two
            sides compute; None if they are not meant to be equal.
        close: Called at the end.
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    difference: Callable[[], float] | None = None
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table.

    Attributes:
        name: Such as "step/xgrad"; the part before the slash is its section.
        ours: What is timed, in words.
        peer: What it is timed against, in words.
        build: Makes both sides. Raises `ValueError` or a `RegradError` if that
            cannot be done, and the table says so.
        goal: The largest ratio that is good enough; None if there is no goal.
        goal_ms: The most milliseconds of our side that are good enough.
        memory_goal: The same for the ratio of peak memories; it is measured where this is given.
        scale: The ratio is divided by it: what the sizes of both sides suggest.
        most_pairs: Pairs at most, for what takes seconds.
        repeats: Calls per measurement, for what takes microseconds.
        host_only: Whether it is about the host only, whatever the device.
        wall: Whether it waits for another process.
        only_memory: Whether the ratio is that of the peak memories, and nothing is timed.
    """

    name: str
    ours: str
    peer: str
    build: Callable[[Setting], Pair]
    goal: float | None = None
    goal_ms: float | None = None
    memory_goal: float | None = None
    scale: float = 1.0
    most_pairs: int = 1000
    repeats: int = 1
    host_only: bool = False
    wall: bool = False
    only_memory: bool = False


class Attached:
    """Corrections on a model and its optimizer, past the steps in which the effect meter looks.

    Args:
        model: The model.
        optimizer: Its optimizer.
        corrections: As for `regrad.attach`.
        criterion: As for `regrad.attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        corrections: list[str | Correction],
        criterion: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.attachment: Attachment = regrad.attach(model, optimizer, corrections, criterion)
        self.model = model
        self.engine = self.attachment.engine
        self.pass_the_meter()

    def pass_the_meter(self) -> None:
        """Pretend that so many steps were taken that none of the next ones is measured."""
        self.engine.applied = BEYOND_THE_METER

    def correct(self) -> None:
        """Do what the hooks do in one step, without forward pass, backward pass and update."""
        self.engine.before_forward(self.model)
        self.engine.before_step(self.engine.optimizer, (self.engine.optimizer,), {})
        self.engine.after_step()

    def predict_and_restore(self) -> None:
        """Do what the window does in a step."""
        self.engine.before_forward(self.model)
        self.engine.window.close(before_step=True)
        self.engine.window.end_step()
