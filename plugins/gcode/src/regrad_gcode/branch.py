"""The branch beside a stage: a projection, then a neural ordinary differential equation."""

import math
from functools import partial
from typing import Literal

import torch
from regrad.errors import refuse_if
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

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

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        """Return dx/dt [B, C, H, W] at a time (scalar) and state [B, C, H, W]."""
        features = torch.relu(self.depthwise(self.norm(state)))
        weight, bias = self.pointwise.parameters()
        # A constant channel under a pointwise convolution is a bias: nothing needs to be concatenated.
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
        RegradError: If no stride leads from the one size to the other.
    """

    def __init__(
        self, before: tuple[int, ...], after: tuple[int, ...], *, solver: str, adjoint: bool
    ) -> None:
        super().__init__()
        strides = [-(-long // short) for long, short in zip(before[1:], after[1:], strict=True)]
        reached = tuple(
            -(-long // stride) for long, stride in zip(before[1:], strides, strict=True)
        )
        unfit = reached != after[1:]
        refuse_if(
            unfit,
            f"stages must shrink images by a stride, got {before} to {after}; name others with stages=[…]",
        )
        same = before == after
        self.project = (
            nn.Identity()
            if same
            else nn.Conv2d(before[0], after[0], 1, stride=(strides[0], strides[1]))
        )
        self.field, self.solver, self.adjoint = Field(after[0]), solver, adjoint
        self.register_buffer("times", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return b [B, C', H', W'] of h [B, C, H, W], both in the branch's precision."""
        adjoint = (
            self.adjoint and not self.field.pointwise.weight.requires_grad
        )  # a fit needs the steps' own gradients
        # Without the empty tuple the adjoint would write gradients into the field's parameters.
        solve = partial(odeint_adjoint, adjoint_params=()) if adjoint else odeint
        how = {"method": self.solver, "rtol": 1e-4, "atol": 1e-4}  # of adaptive solvers
        return solve(self.field, self.project(hidden), self.times, **how)[-1]  # type: ignore[no-any-return]
