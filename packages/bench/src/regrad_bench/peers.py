"""Find where a peer silently computes something other than its source says, by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from pytorch_optimizer import agc, centralize_gradient
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import SGD

from regrad_bench.cases import Attached
from regrad_bench.tensors import largest_difference

RATIO = 0.01
FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a peer did on one layer.

    Attributes:
        peer: Its name and version.
        what: What was tried.
        peer_error: Relative difference between the peer's result and the rule.
        our_error: The same for our correction.
        why: Where the difference comes from.
    """

    peer: str
    what: str
    peer_error: float
    our_error: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One peer on one layer.

    Attributes:
        distribution: What the peer comes from.
        what: In words.
        correction: Our correction, as for `regrad.create`.
        layer: Makes the layer; its first parameter is looked at.
        units: Which dimensions one unit of that parameter spans; None for all of them.
        peer: Changes the gradient of a parameter in place.
        why: Why it may be wrong.
    """

    distribution: str
    what: str
    correction: str
    layer: Callable[[], nn.Module]
    units: tuple[int, ...] | None
    peer: Callable[[nn.Parameter], object]
    why: str


class Gain(nn.Module):
    """A gain of shape (C, 1, 1), as layers scale their channels with."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(8, 1, 1))


def _agc_of_pytorch_optimizer(parameter: nn.Parameter) -> None:
    gradient = _gradient(parameter)
    gradient.copy_(agc(parameter.detach(), gradient, FLOOR, RATIO))


def _centralization_of_pytorch_optimizer(parameter: nn.Parameter) -> None:
    centralize_gradient(_gradient(parameter))


AGC = "agc:head=none"
TIMM = "timm"
OTHER = "pytorch-optimizer"
TRIALS = (
    Trial(
        distribution=OTHER,
        what="AGC of a Conv1d",
        correction=AGC,
        layer=lambda: nn.Conv1d(6, 8, 5),
        units=(1, 2),
        peer=_agc_of_pytorch_optimizer,
        why="norms over dimension 1 alone, so every tap of the kernel is a unit",
    ),
    Trial(
        distribution=TIMM,
        what="AGC of a gain (C, 1, 1)",
        correction=AGC,
        layer=Gain,
        units=None,
        peer=adaptive_clip_grad,
        why="every element is a unit, so the gain's direction is lost",
    ),
    Trial(
        distribution=TIMM,
        what="AGC of a ConvTranspose2d",
        correction=AGC,
        layer=lambda: nn.ConvTranspose2d(6, 8, 3),
        units=(0, 2, 3),
        peer=adaptive_clip_grad,
        why="dimension 0 of a transposed convolution counts inputs",
    ),
    Trial(
        distribution=OTHER,
        what="centralization of a ConvTranspose2d",
        correction="centralization",
        layer=lambda: nn.ConvTranspose2d(6, 8, 3),
        units=(0, 2, 3),
        peer=_centralization_of_pytorch_optimizer,
        why="dimension 0 of a transposed convolution counts inputs",
    ),
    Trial(
        distribution=TIMM,
        what="AGC of a Conv2d",
        correction=AGC,
        layer=lambda: nn.Conv2d(6, 8, 3),
        units=(1, 2, 3),
        peer=adaptive_clip_grad,
        why="right",
    ),
    Trial(
        distribution=TIMM,
        what="AGC of a Linear",
        correction=AGC,
        layer=lambda: nn.Linear(6, 8),
        units=(1,),
        peer=adaptive_clip_grad,
        why="right",
    ),
    Trial(
        distribution=OTHER,
        what="AGC of a Linear",
        correction=AGC,
        layer=lambda: nn.Linear(6, 8),
        units=(1,),
        peer=_agc_of_pytorch_optimizer,
        why="right",
    ),
)


def findings() -> list[Finding]:
    """Run every trial, in float64 on the CPU."""
    return [_find(trial) for trial in TRIALS]


def _find(trial: Trial) -> Finding:
    with torch.random.fork_rng(devices=[]):
        layer = trial.layer().double()
    parameter, start = _with_gradient(layer)
    rule = _agc_rule if trial.correction == AGC else _centralization_rule
    right = rule(parameter.detach(), start, trial.units)
    trial.peer(parameter)
    theirs = _gradient(parameter).clone()
    _gradient(parameter).copy_(start)
    attached = Attached(layer, SGD(layer.parameters(), lr=0.1), [trial.correction])
    attached.correct()
    attached.attachment.detach()
    return Finding(
        peer=f"{trial.distribution} {version(trial.distribution)}",
        what=trial.what,
        peer_error=largest_difference([theirs], [right]),
        our_error=largest_difference([_gradient(parameter)], [right]),
        why=trial.why,
    )


def _with_gradient(layer: nn.Module) -> tuple[nn.Parameter, Tensor]:
    """Fill the layer's first parameter and its gradient; its other parameters get none."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(layer.parameters())
    with torch.no_grad():
        parameter.normal_(generator=generator)
        # Units of very different sizes, so that some are clipped and some are not.
        sizes = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) ** 6
        parameter.grad = torch.empty_like(parameter).normal_(generator=generator) * sizes
    return parameter, _gradient(parameter).clone()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("parameter must have a gradient, got None")
    return parameter.grad


def _agc_rule(weight: Tensor, gradient: Tensor, units: tuple[int, ...] | None) -> Tensor:
    """Return AGC's rule as the paper has it, a unit spanning the dimensions `units`."""
    largest = RATIO * torch.linalg.vector_norm(weight, dim=units, keepdim=True).clamp_min(FLOOR)
    norm = torch.linalg.vector_norm(gradient, dim=units, keepdim=True)
    return torch.where(norm > largest, gradient * largest / norm, gradient)


def _centralization_rule(_: Tensor, gradient: Tensor, units: tuple[int, ...] | None) -> Tensor:
    """Return centralization's rule as the paper has it."""
    return gradient - gradient.mean(dim=units, keepdim=True)
