"""Clipping by norm, by value and of the update as corrections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.hooks import WRAPPER
from regrad.hookspecs import Layout, Step, learning_rate
from regrad.signatures import takes
from torch import Tensor
from torch.optim import Optimizer

from regrad_clipping.functional import (
    check_positive,
    clip_norm_,
    clip_updates_,
    clip_value_,
    gradient_norm,
)

CLIPPING = Needs(
    stages=("gradient",),
    closures=True,
    after=("centralization", "gcw"),
)


class ClipNorm(Correction):
    r"""Scale all gradients together so that their norm stays within a bound.

    .. math:: G \leftarrow G \min(1, c / (\|G\| + 10^{-6}))

    as `torch.nn.utils.clip_grad_norm_` does, over every gradient of the optimizer,
    after a GradScaler's scale is gone. With several optimizers each clips by the norm
    of its own gradients. Pipeline stages are refused unless `attach` is given their
    `model_group`: each rank would clip by the norm of its own part. A NaN or infinite
    norm spreads to every gradient, as in torch.

    Args:
        max_norm: c, the largest norm, in the units of the gradient. Positive.

    Raises:
        ValueError: If `max_norm` is not positive.

    Example:
        >>> ClipNorm(max_norm=0.5)
        ClipNorm(max_norm=0.5)

    References:
        Pascanu, Mikolov and Bengio, 2013, "On the difficulty of training recurrent
        neural networks", algorithm 1.
    """

    name = "clip-norm"
    needs = with_changes(
        CLIPPING,
        reads=("model",),
        conflicts={"parts": "pass attach(…, model_group=…), over which the norm is taken"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The bound."""

        max_norm: float = 1.0

        def __post_init__(self) -> None:
            check_positive("max_norm", self.max_norm)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._norm: Tensor | None = None

    def setup(self, attachment: Attachment) -> None:
        """Note if the optimizer holds only a part of the model: only that part's norm is read."""
        held = set(attachment.engine.step().names)
        trained = [
            re.sub(WRAPPER, "", name)
            for name, parameter in attachment.model.named_parameters()
            if parameter.requires_grad
        ]
        seen = [name for name in trained if name in held]
        if len(seen) < len(trained):
            note = (
                f"'clip-norm' reads the norm of {len(seen)} of {len(trained)} trainable "
                "parameters: those that its optimizer holds"
            )
            attachment.reasons = (*attachment.reasons, note)

    def correct_gradients(self, step: Step) -> None:
        """Clip the gradients of the step."""
        grads = [g for g in step.gradients if g is not None]
        layout = step.layout
        if layout is not None and layout.model_group is not None:
            self._norm = _norm_of_all_parts(grads, step.parameters[0], layout)
        elif grads:
            self._norm = gradient_norm(grads)
        if grads and self._norm is not None:
            clip_norm_(grads, self._norm, max_norm=self.options.max_norm)

    def metrics(self) -> dict[str, float]:
        """Return the last gradient norm before clipping."""
        return {} if self._norm is None else {"norm": self._norm.item()}

    def control(self, optimizer: Optimizer) -> Control:
        """Return adaptive clipping, which needs no bound in the units of the gradient."""
        return Control(name="agc", corrections=("agc",))

    def idle_reason(self) -> None:
        """Return None: a bound that is never reached is information, not a fault."""


def _norm_of_all_parts(grads: Sequence[Tensor], like: Tensor, layout: Layout) -> Tensor:
    """Return the norm of the gradients of a model whose parts several processes hold.

    Args:
        grads: Those of this process. May be empty: it takes part in the sum all the same.
        like: A parameter, for device and type.
        layout: Adds over the processes.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    square = gradient_norm(grads).to(like.device, dtype).square()
    return layout.sum_over_model(square).sqrt()


class ClipValue(Correction):
    r"""Clamp every element of every gradient to a bound.

    .. math:: G \leftarrow \min(\max(G, -c), c)

    as `torch.nn.utils.clip_grad_value_` does. It is harmful before an optimizer that divides by the
    gradient's own deviation, as AdaBelief does: constant gradients make steps of 3e5 times the
    learning rate.

    Args:
        max_value: c, the largest magnitude, in the units of the gradient. Positive.

    Raises:
        ValueError: If `max_value` is not positive.
        RegradError: At attach, if a parameter is complex.

    Example:
        >>> ClipValue(max_value=0.5)
        ClipValue(max_value=0.5)
    """

    name = "clip-value"
    needs = with_changes(CLIPPING, reads=("elements",))

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The bound."""

        max_value: float = 1.0

        def __post_init__(self) -> None:
            check_positive("max_value", self.max_value)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def setup(self, attachment: Attachment) -> None:
        """Refuse complex parameters: their numbers have no order."""
        for group in attachment.optimizer.param_groups:
            if any(parameter.is_complex() for parameter in group["params"]):
                raise RegradError(
                    "'clip-value' has no rule for complex parameters; "
                    "train them with a separate optimizer, or use clip-norm"
                )

    def correct_gradients(self, step: Step) -> None:
        """Clamp the gradients of the step."""
        clip_value_([g for g in step.gradients if g is not None], max_value=self.options.max_value)

    def idle_reason(self) -> None:
        """Return None: a bound that is never reached is information, not a fault."""


class ClipUpdate(Correction):
    r"""Shrink what the optimizer adds to each tensor where it is large for its learning rate.

    For a tensor with step Δ, without decoupled weight decay, and learning rate :math:`\eta`

    .. math:: \Delta \leftarrow \Delta / \max(1, \operatorname{rms}(\Delta/\eta)/d).

    The step of Adam and its relatives has an rms of about :math:`\eta` at most in calm training;
    it is larger where the second moment lags behind gradients that suddenly grow. Other optimizers
    have steps of other sizes: look at the metric `smallest_factor` before choosing d.

    Args:
        max_rms: d, the largest root mean square of a tensor's step, in units of the learning rate.
            Positive.

    Raises:
        ValueError: If `max_rms` is not positive.
        RegradError: At attach, if the optimizer's learning rate is not a number.

    Example:
        >>> ClipUpdate(max_rms=0.5)
        ClipUpdate(max_rms=0.5)

    References:
        Shazeer and Stern, 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        section 6, there as a part of Adafactor, whose update is relative to the weights; here on
        any optimizer.
    """

    name = "clip-update"
    needs = Needs(
        stages=("update",),
        closures=True,
        after=("cautious", "centralization"),
        reads=("tensor",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The bound."""

        max_rms: float = 1.0

        def __post_init__(self) -> None:
            check_positive("max_rms", self.max_rms)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factors: list[Tensor] = []

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer without a rate."""
        for group in attachment.optimizer.param_groups:
            learning_rate(attachment.optimizer, group)

    def correct_update(self, step: Step) -> None:
        """Clip what the optimizer did."""
        displacements: list[Tensor] = []
        rates: list[float | Tensor] = []
        for parameter, displacement in zip(step.parameters, step.displacements, strict=True):
            if displacement is not None and displacement.numel():
                displacements.append(displacement)
                rates.append(step.lr_of(parameter))
        self._factors = clip_updates_(displacements, rates, max_rms=self.options.max_rms)

    def metrics(self) -> dict[str, float]:
        """Return the share of tensors clipped in the last step, and the smallest factor."""
        if not self._factors:
            return {}
        factors = torch.stack([factor.double().cpu() for factor in self._factors])
        return {
            "share_clipped": (factors < 1).double().mean().item(),
            "smallest_factor": factors.min().item(),
        }

    def control(self, optimizer: Optimizer) -> Control:
        """Return clipping of the gradient by its norm, which knows nothing of the update."""
        return Control(name="clip-norm", corrections=("clip-norm",))

    def idle_reason(self) -> None:
        """Return None: a bound that is never reached is information, not a fault."""
