"""Cautious optimizers as a correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.hookspecs import Step
from regrad.signatures import takes
from torch import Tensor
from torch.optim import Optimizer

from regrad_cautious.functional import Divisor, Keep, keep_agreeing_in_all_


class Cautious(Correction):
    r"""Leave out of the optimizer's step what goes up the gradient, and lengthen the rest.

    For a tensor with step Δ, without decoupled weight decay, and gradient g,

    .. math::
        m_i = [-\Delta_i g_i > 0], \qquad
        \Delta_i \leftarrow \frac{m_i}{\max(\bar m, 10^{-3})}\,\Delta_i.

    On AdamW this is the authors' C-AdamW: the sign of the step is that of the first moment. It acts
    on what any optimizer did to the weights, and reads no state of it.

    Args:
        divisor: "share" divides by the mean of the mask, at least .001, as timm and transformers
            do; "count" by (sum + 1)/N, as the authors and pytorch_optimizer do.
        keep: "agreeing"; or "all", the control: every element is divided, none is left out.

    Raises:
        TypeError: If an option has any other value.
        RegradError: At attach, if a parameter is complex. At the first step, if the optimizer
            writes into the gradients.

    Example:
        >>> Cautious()
        Cautious(divisor='share', keep='agreeing')

    References:
        Liang, Chen, Liu and Liu, 2024, "Cautious Optimizers: Improving Training with One Line of
        Code", algorithms 1 and 2. There the mask compares the gradient with the update before the
        rate; here with the change of the weights, which has the opposite sign, unless it is so
        small that it rounds to nothing.
    """

    name = "cautious"
    needs = Needs(stages=("update",), reads=("tensor",))

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What the step is divided by, and what is kept of it."""

        divisor: Divisor = "share"
        keep: Keep = "agreeing"

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._shares: list[Tensor] = []
        self._sizes: list[int] = []

    def setup(self, attachment: Attachment) -> None:
        """Refuse complex parameters: their products have no sign."""
        for group in attachment.optimizer.param_groups:
            if any(parameter.is_complex() for parameter in group["params"]):
                raise RegradError(
                    "'cautious' has no rule for complex parameters; "
                    "train them with a separate optimizer"
                )

    def correct_update(self, step: Step) -> None:
        """Mask what the optimizer did."""
        displacements: list[Tensor] = []
        gradients: list[Tensor] = []
        climbs: list[bool] = []
        rows = zip(step.parameters, step.displacements, step.gradients, strict=True)
        for parameter, displacement, gradient in rows:
            if displacement is None or gradient is None:
                continue
            displacements.append(displacement)
            gradients.append(gradient)
            climbs.append(bool(step.group_of(parameter).get("maximize")))
        self._shares = keep_agreeing_in_all_(
            displacements,
            gradients,
            divisor=self.options.divisor,
            keep=self.options.keep,
            maximize=climbs,
        )
        self._sizes = [displacement.numel() for displacement in displacements]

    def metrics(self) -> dict[str, float]:
        """Return the share of all elements that agreed with their gradient in the last step."""
        if not sum(self._sizes):
            return {}
        shares = torch.stack([share.double().cpu() for share in self._shares])
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        return {"share_agreeing": float((shares * sizes).sum() / sizes.sum())}

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return the same lengthening of every element: a larger step, without a mask."""
        if self.options.keep == "all":
            return None
        without_a_mask = type(self)(divisor=self.options.divisor, keep="all")
        return Control(name="larger-step", corrections=(without_a_mask.as_text(),))

    def idle_reason(self) -> str:
        """Say why no step may have changed."""
        return (
            "every element of every step agreed with its gradient (an optimizer without momentum "
            "always does)"
        )
