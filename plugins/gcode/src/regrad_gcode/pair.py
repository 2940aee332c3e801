"""Two adjacent hidden states, the branch between them, and what fits the branch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from regrad_gcode.branch import Branch

Shape = tuple[int, ...]


@dataclass(eq=False)
class Passage:
    """One forward through a stage that waits for its backward.

    Attributes:
        hidden: h before the stage, detached; None once the step is over.
        index: Which output of its node the stage's output is.
        is_view: Whether that output shares its memory with the tensor before.
        gradient: The gradient of the stage's output, between its coming and its use.
    """

    hidden: Tensor | None
    index: int
    is_view: bool
    gradient: Tensor | None = None

    def keep(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradient when it is complete: with what the next pair adds to it."""
        self.gradient = gradients[self.index]


class Pair:
    """A pair (h before, h after), its branch with an own Adam, and what was seen last.

    Args:
        name: Of the stage between them.
        shapes: [C, H, W] before and after.
        options: The correction's.
        seed: Fixes the branch's weights; no global random number is drawn.
        like: Tells device and precision (float32 at least).

    Attributes:
        dtype: What the branch computes in.
        entered: What went into the stage that is running.
        sample: (h before, h after) to fit to, of the last forward of a step that fits.
        witnessed: The gradient before and after the correction, in a measured step.
        passages: Forwards through the stage so far.
        seen: What the last measurements gave, by name.
    """

    entered: Tensor | None = None
    sample: tuple[Tensor, Tensor] | None = None
    witnessed: tuple[Tensor, Tensor] | None = None
    passages = 0

    def __init__(self, name: str, shapes: tuple[Shape, Shape], options: Any, seed: int, like: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: others are not forked
            branch = Branch(*shapes, solver=options.solver, adjoint=options.adjoint)
        self.name, self.shapes = name, shapes
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.branch = branch.to(like.device, self.dtype).requires_grad_(False)
        self.adam = torch.optim.Adam(self.branch.parameters(), lr=options.learning_rate)
        self.seen: dict[str, Tensor] = {}
        for parameter in self.branch.parameters() if is_distributed() else ():
            distributed.broadcast(parameter, 0)

    def fit(self) -> None:
        """Take one step of the branch towards its stage, with the ranks' mean gradient."""
        for parameter, gradient in zip(self.branch.parameters(), self._fit_gradients(), strict=True):
            parameter.grad = gradient.contiguous()
            if is_distributed():
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(distributed.get_world_size())
        self.adam.step()
        self.adam.zero_grad()

    def _fit_gradients(self) -> Sequence[Tensor]:
        """Return the gradients of mean (b − h)² on the sample; zeros where this rank has none."""
        parameters, sample, self.sample = [*self.branch.parameters()], self.sample, None
        if sample is None:
            return [torch.zeros_like(p) for p in parameters]
        before, after = (hidden.to(self.dtype) for hidden in sample)
        self.branch.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(before.device.type, enabled=False):
            loss = nn.functional.mse_loss(self.branch(before), after)
            gradients = torch.autograd.grad(loss, parameters)
        self.branch.requires_grad_(False)
        self.seen["fit_loss"] = loss.detach()
        return gradients

    def state(self) -> dict[str, Any]:
        """Return copies of the branch's weights and its Adam's state."""
        kept = {"shapes": self.shapes, "branch": self.branch.state_dict(), "adam": self.adam.state_dict()}
        return copy.deepcopy(kept)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.branch.load_state_dict(state["branch"])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))


def is_distributed() -> bool:
    """Say whether there are other ranks to agree with."""
    return distributed.is_available() and distributed.is_initialized()
