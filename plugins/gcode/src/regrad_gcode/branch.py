"""The branch beside a stage: a projection, then a neural ordinary differential equation."""

import math
from functools import partial
from typing import Literal

import torch
from regrad import RegradError
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from regrad_gcode.single_step import SOLVERS

Solver = Literal[
    "euler", "midpoint", "heun3", "rk4", "bosh3", "adaptive_heun", "fehlberg2", "dopri5", "dopri8"
]


class Field(nn.Module):
    r"""The field :math:`\varphi(x, t)` of :math:`dx/dt = \varphi(x, t)`.

    .. math:: \varphi(x, t) = V\,[\mathrm{ReLU}(D * \mathrm{GroupNorm}(x));\ t] + c

    with D a depthwise 3×3 convolution, V a pointwise one, whose last input channel is the
    constant t.

    Args:
        channels: C of the state, shape [B, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A group of one channel at 1×1 pixels would normalise every number to 0.
        self.norm = nn.GroupNorm(math.gcd(8, channels) if channels > 8 else 1, channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels + 1, channels, 1)

    def forward(self, time: Tensor | float, state: Tensor) -> Tensor:
        """Return dx/dt [B, C, H, W] at a time (a number) and state [B, C, H, W]."""
        features = torch.relu(self.depthwise(self.norm(state)))
        weight, bias = self.pointwise.parameters()
        # A constant channel acts as a bias here, so nothing has to be concatenated.
        return nn.functional.conv2d(features, weight[:, :-1], bias + time * weight[:, -1, 0, 0])


class Branch(nn.Module):
    r"""b = ODESolve(φ, P(h), t: 0 → 1).

    P is a strided 1×1 convolution, the identity where the shapes agree.

    Args:
        before: Shape [C, H, W] of the hidden state that goes in.
        after: Shape [C', H', W'] of the one that b follows.
        solver: Name of torchdiffeq's method; those of fixed steps take one.
        adjoint: Whether the gradient with respect to h solves the adjoint equation
            backwards instead of differentiating the solver's steps.

    Raises:
        RegradError: If no stride leads from one size to the other.
    """

    def __init__(
        self, before: tuple[int, ...], after: tuple[int, ...], *, solver: str, adjoint: bool
    ) -> None:
        super().__init__()
        strides = [
            math.ceil(long / short) for long, short in zip(before[1:], after[1:], strict=True)
        ]
        reached = tuple(
            math.ceil(long / stride) for long, stride in zip(before[1:], strides, strict=True)
        )
        if reached != after[1:]:
            raise RegradError(
                f"stages must shrink images by a stride, got {before} to {after}; "
                "name others with stages=[…]"
            )
        self.project: nn.Module = nn.Identity()
        if before != after:
            stride = (strides[0], strides[1])
            self.project = nn.Conv2d(before[0], after[0], 1, stride=stride)
        self.field = Field(after[0])
        self.solver = solver
        self.adjoint = adjoint
        self.register_buffer("times", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return b [B, C', H', W'] of h [B, C, H, W], both in the branch's precision."""
        start = self.project(hidden)
        is_fitted = self.field.pointwise.weight.requires_grad
        solve = odeint
        if self.adjoint and not is_fitted:  # a fit needs the gradients of the solver's own steps
            # Without adjoint_params=() it would write gradients into the field's parameters.
            solve = partial(odeint_adjoint, adjoint_params=())
        elif self.solver in SOLVERS:
            return SOLVERS[self.solver](self.field, start)
        states = solve(
            self.field,
            start,
            self.times,
            method=self.solver,
            rtol=1e-4,  # both tolerances are for adaptive solvers
            atol=1e-4,
        )
        return states[-1]  # type: ignore[no-any-return]
