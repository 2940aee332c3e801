"""Two adjacent hidden states, the branch between them, and its fit."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from regrad_gcode.branch import Branch

Shape = tuple[int, ...]


@dataclass(eq=False)
class Passage:
    """One forward through a stage that waits for its backward.

    Attributes:
        hidden: h before the stage, detached; None once the step is over.
        index: Which output of its node the stage's output is.
        is_view: Whether that output shares its memory with the tensor before.
        sample: Copies of h before and after, to fit to; None in most steps, and once it is used.
        gradient: The gradient of the stage's output, between its coming and its use.
    """

    hidden: Tensor | None
    index: int
    is_view: bool
    sample: tuple[Tensor, Tensor] | None
    gradient: Tensor | None = None


class Pair:
    """A pair (h before, h after), its branch with its own Adam, and the last measurements.

    Args:
        name: Of the stage between them.
        shapes: [C, H, W] before and after.
        options: The correction's.
        seed: Fixes the branch's weights; no global random number is drawn.
        like: Tells device and precision (float32 at least).

    Attributes:
        dtype: What the branch computes in.
        entered: What went into the stage that is running.
        sums: What `collect` added up over the micro-batches of a step that fits.
        witnessed: The gradient before and after the correction, in a measured step.
        passages: Forwards through the stage so far.
        seen: What the last measurements gave, by name.
    """

    entered: Tensor | None = None
    sums: Sequence[Tensor] = ()
    witnessed: tuple[Tensor, Tensor] | None = None
    passages = 0

    def __init__(
        self, name: str, shapes: tuple[Shape, Shape], options: Any, seed: int, like: Tensor
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: others are not forked
            branch = Branch(*shapes, solver=options.solver, adjoint=options.adjoint)
        self.name = name
        self.shapes = shapes
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.branch = branch.to(like.device, self.dtype).requires_grad_(False)
        self.adam = torch.optim.Adam(self.branch.parameters(), lr=options.learning_rate)
        self.seen: dict[str, Tensor] = {}
        if is_distributed():
            for parameter in self.branch.parameters():
                distributed.broadcast(parameter, 0)

    def forget(self, condition: Tensor) -> None:
        """Drop the sums if the condition holds: they belong to no step that will be taken."""
        # Not multiplied: 0 × infinity is NaN.
        self.sums = [torch.where(condition.to(kept.device), 0, kept) for kept in self.sums]

    def collect(self, before: Tensor, after: Tensor) -> None:
        """Add one micro-batch: the gradients of the sum of (b − h)² and its number of elements."""
        self.branch.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(before.device.type, enabled=False):
            # Up to torch 2.12 at least, GroupNorm's backward crashes on a CPU in channels-last
            # format where its input needs no gradient.
            start = before.to(self.dtype).contiguous()
            errors = self.branch(start) - after.to(self.dtype)
            gradients = torch.autograd.grad(errors.square().sum(), [*self.branch.parameters()])
        self.branch.requires_grad_(False)
        self.seen["fit_loss"] = errors.detach().square().mean()
        new = [*gradients, torch.full_like(self.seen["fit_loss"], after.numel())]
        if self.sums:
            new = [one + other for one, other in zip(new, self.sums, strict=True)]
        self.sums = new

    def fit(self) -> None:
        """Take one step of the branch along the ranks' mean of the gradient of mean (b − h)²."""
        parameters = list(self.branch.parameters())
        if self.sums:
            *gradients, count = self.sums
        else:  # this rank saw nothing
            gradients = [torch.zeros_like(parameter) for parameter in parameters]
            count = torch.ones(())
        self.sums = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = (gradient / count.clamp_min(1)).contiguous()
            if is_distributed():
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(distributed.get_world_size())
        self.adam.step()
        self.adam.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return copies of the branch's weights and its Adam's state."""
        kept = {
            "shapes": self.shapes,
            "branch": self.branch.state_dict(),
            "adam": self.adam.state_dict(),
        }
        return copy.deepcopy(kept)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.branch.load_state_dict(state["branch"])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))


def is_distributed() -> bool:
    """Say whether there are other ranks to agree with."""
    return distributed.is_available() and distributed.is_initialized()
