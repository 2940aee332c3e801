"""XGrad: gradients at the weights that the next update is predicted to reach."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import torch
from regrad import Attachment, Correction, RegradError, RegradWarning
from regrad.correction import Control, Needs
from regrad.hookspecs import LastStep, Step, learning_rate
from regrad.optimizers import decoupled_decay, looks_ahead, nesterov_control
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_xgrad.functional import Scalar


class XGrad(Correction):
    r"""Take each step's gradient at predicted weights.

    Per optimizer step: save θ, move on along the last step, run forward and backward there, restore
    θ, step as usual. With rate :math:`\eta`, decoupled decay :math:`\lambda` and horizon s,

    .. math:: \hat\theta_t = \theta_t
        + s\,\frac{\eta_t}{\eta_{t-1}}(\theta_t - (1-\eta_{t-1}\lambda)\,\theta_{t-1}).

    The optimizer's state is not read: what it will subtract per unit of rate is assumed to be what
    it subtracted last. Parameters that the last step did not change, and all parameters in the
    first step, are not moved.

    Args:
        horizon: s, how many updates ahead. Real, at least 0.
        decoupled_decay: Decay rate λ of a foreign optimizer whose step contains
            :math:`-\eta\lambda\theta`; at least 0. None reads it from torch's own
            classes, pytorch_optimizer's groups and any group with `decoupled_weight_decay`, and
            warns if another optimizer has a weight decay.
        compiled: Compile the pass over large tensors on a CPU by `torch.compile`, once in a
            process; without a compiler it continues uncompiled, after a warning. The weights differ
            by rounding.
        allow_double_lookahead: Permit an optimizer that takes a Nesterov step itself
            (`nesterov=True`, NAdam), or a second correction that looks ahead.

    Raises:
        ValueError: If `horizon` or `decoupled_decay` is negative or not finite.
        RegradError: At attach, on an optimizer that already looks ahead, or whose
            learning rate is not a number.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> attachment = regrad.attach(model, optimizer, [XGrad(horizon=1.0)])

    References:
        Guan, Li, Shi and Meng, 2023, "XGrad: Boosting Gradient-Based Optimizers With
        Weight Prediction", algorithm 1, which reads the direction from the state of
        five optimizers; computed from the weights it is the same up to rounding, for every
        optimizer. Unlike the authors' code this works after `zero_grad(set_to_none=True)`, restores
        the weights bit for bit, and covers AMSGrad.
    """

    name = "xgrad"
    needs = Needs(
        stages=("weights",),
        exclusive=("look-ahead",),
        reads=("elements",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How far to look ahead, and what to remove from foreign steps."""

        horizon: float = 1.0
        decoupled_decay: float | None = None
        compiled: bool = False
        allow_double_lookahead: bool = False

        def __post_init__(self) -> None:
            for name in ("horizon", "decoupled_decay"):
                value = getattr(self, name)
                if value is not None and not (value >= 0 and math.isfinite(value)):
                    raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.allow_double_lookahead:
            self.needs = with_changes(self.needs, exclusive=())
        # Rate of the last step, and rate times decoupled decay, by parameter name.
        self._last: dict[str, dict[str, Scalar]] = {}

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer without a rate, or that looks ahead; warn if decay is unknown."""
        optimizer = attachment.optimizer
        for group in optimizer.param_groups:
            learning_rate(optimizer, group)
        if looks_ahead(optimizer) and not self.options.allow_double_lookahead:
            raise RegradError(
                f"'xgrad' on {type(optimizer).__name__} with a Nesterov step would look ahead "
                "twice; use nesterov=False, or allow_double_lookahead=True"
            )
        for group in optimizer.param_groups:
            if any(parameter.is_complex() for parameter in group["params"]):
                raise RegradError(
                    "'xgrad' has no rule for complex parameters; "
                    "train them with a separate optimizer"
                )
        if self.options.decoupled_decay is None:
            _warn_of_unknown_decay(optimizer)

    def predict_weights(self, step: Step) -> list[LastStep]:
        """Return how far each parameter moves on along its last step."""
        factors = _Factors(self.options.horizon)
        return [self._go_on(name, step.lr_of(p), factors) for name, p in step.named_parameters()]

    def _go_on(self, name: str, rate: Scalar, factors: _Factors) -> LastStep:
        """Return s·η_t/η_{t−1} last steps, without their decoupled decay."""
        last = self._last.get(name)
        if last is None:
            return LastStep(factor=0.0)
        return LastStep(
            factor=factors.of(rate, last["rate"]),
            decay=last["decay"],
            is_compiled=self.options.compiled,
        )

    def after_step(self, step: Step) -> None:
        """Keep the rate of the step, and the decay in it, once for each group."""
        of_groups: dict[int, dict[str, Scalar]] = {}
        last: dict[str, dict[str, Scalar]] = {}
        for name, parameter in step.named_parameters():
            group = step.group_of(parameter)
            if id(group) not in of_groups:
                of_groups[id(group)] = self._rate_and_decay(step, parameter)
            last[name] = of_groups[id(group)]
        self._last = last

    def _rate_and_decay(self, step: Step, parameter: nn.Parameter) -> dict[str, Scalar]:
        """Return the rate of the step that was made, and rate times decoupled decay."""
        rate = step.lr_of(parameter)
        if isinstance(rate, Tensor):
            rate = rate.detach().clone().reshape(())
        decay = self.options.decoupled_decay
        if decay is None:
            decay = decoupled_decay(step.optimizer, step.group_of(parameter))
        return {"rate": rate, "decay": rate * decay if decay else 0.0}

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return Nesterov's momentum, which this equals on SGD up to the horizon; NAdam on Adam."""
        return nesterov_control(optimizer)

    def idle_reason(self) -> str:
        """Say why no weight may have moved."""
        if self.options.horizon == 0:
            return "horizon is 0"
        return (
            "no parameter had a last step to predict from (was the learning rate 0 throughout, or "
            "are the weights written between the steps?)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rate of the last step and the decay in it, by parameter name."""
        return {"last": {name: dict(last) for name, last in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the rates and decays of the last step."""
        self._last = {
            name: {"rate": last["rate"], "decay": last["decay"]}
            for name, last in state["last"].items()
        }


class _Factors:
    """How many last steps to move on, computed once for each pair of rates.

    Args:
        horizon: s.
    """

    def __init__(self, horizon: float) -> None:
        self._horizon = horizon
        self._found: dict[tuple[int, int], Scalar] = {}

    def of(self, rate: Scalar, last_rate: Scalar) -> Scalar:
        """Return s·rate/last_rate; 0 if the last rate was 0, whose step is uninformative."""
        key = (id(rate), id(last_rate))
        if key not in self._found:
            self._found[key] = self._horizon * _ratio(rate, last_rate)
        return self._found[key]


def _ratio(rate: Scalar, last_rate: Scalar) -> Scalar:
    """Return rate / last_rate; 0 if the last rate was 0."""
    if not (isinstance(rate, Tensor) or isinstance(last_rate, Tensor)):
        return rate / last_rate if last_rate != 0 else 0.0
    divisor = torch.as_tensor(last_rate)
    divisor = torch.where(divisor == 0, torch.inf, divisor)
    if isinstance(rate, Tensor):
        divisor = divisor.to(rate.device)
        rate = rate.reshape(())
    return rate / divisor


def _warn_of_unknown_decay(optimizer: Optimizer) -> None:
    """Warn if a weight decay may be decoupled."""
    for group in optimizer.param_groups:
        if decoupled_decay(optimizer, group) is not None:
            continue
        warnings.warn(
            f"{type(optimizer).__name__} has a weight_decay that may be decoupled; pass "
            "decoupled_decay=… (0 where the decay is added to the gradient), which 'xgrad' now "
            "assumes to be 0",
            RegradWarning,
            stacklevel=3,
        )
        return
