"""XGrad: gradients at the weights that the coming update is predicted to reach."""

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
from regrad.hookspecs import Step, learning_rate
from regrad.optimizers import looks_ahead, nesterov_control
from regrad.sharding import local
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_xgrad.functional import Scalar
from regrad_xgrad.state_forms import decoupled_decay, state_form


class XGrad(Correction):
    r"""Take each step's gradient at predicted weights.

    Per optimizer step: keep θ, move to :math:`\hat\theta = \theta - s\,\eta\,D`,
    run forward and backward there, restore θ, step as usual. D is what the last
    step subtracted per unit of learning rate, read from the state of torch's SGD
    with momentum, RMSprop with momentum, Adam and AdamW, of `AdaM3`, and of
    pytorch_optimizer's AdaBelief; for every other optimizer the last displacement
    takes its place,
    :math:`s\,\eta_t D = -s\,(\eta_t/\eta_{t-1})(\theta_t - \theta_{t-1})`,
    after decoupled decay has been taken out of it where a step was made. The first step
    predicts nothing.

    Args:
        horizon: s, how many updates ahead. Real, at least 0.
        decoupled_decay: Decay rate λ of a foreign optimizer whose step contains
            :math:`-\eta\lambda\theta`; at least 0. None reads it from torch's own
            classes and warns where a foreign one has a weight decay.
        allow_double_lookahead: Permit an optimizer that takes a Nesterov step itself
            (`nesterov=True`, NAdam), or a second correction that looks ahead.

    Raises:
        ValueError: If `horizon` or `decoupled_decay` is negative or not finite.
        RegradError: At attach, on an optimizer that already looks ahead, or whose
            learning rate is no number.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> attachment = regrad.attach(model, optimizer, [XGrad(horizon=1.0)])

    References:
        Guan, Li, Shi and Meng, 2023, "XGrad: Boosting Gradient-Based Optimizers With
        Weight Prediction", algorithm 1. Unlike the authors' code it works after
        `zero_grad(set_to_none=True)`, restores the weights bit for bit, reads
        AMSGrad's buffer, and covers every optimizer.
    """

    name = "xgrad"
    needs = Needs(
        stages=("weights",),
        exclusive=("look-ahead",),
        reads=("elements", "moments"),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How far to look ahead, and what to take out of foreign steps."""

        horizon: float = 1.0
        decoupled_decay: float | None = None
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
        self._displacements: dict[str, Tensor] = {}
        # The displacement form keeps the weights before a step, then the step and its rate.
        self._before: dict[str, Tensor] = {}
        self._noted: set[str] = set()
        self._last: dict[str, Tensor] = {}
        self._last_rates: dict[str, Scalar] = {}

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer without a rate, or that looks ahead; warn where decay is unknown."""
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

    def predict_weights(self, step: Step) -> list[Tensor | None]:
        """Return the displacements to the predicted weights."""
        moved: dict[str, Tensor] = {}
        for group in step.optimizer.param_groups:
            moved.update(self._predict(step, group))
        return [moved.get(name) for name in step.names]

    def _predict(self, step: Step, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the displacement of each parameter of one group that has a direction, by name."""
        members = {
            name: parameter
            for name, parameter in step.named_parameters()
            if step.group_of(parameter) is group
        }
        form = state_form(step.optimizer, group)
        if form is None:
            moved = {
                name: self._predict_from_displacement(name, parameter, step)
                for name, parameter in members.items()
            }
            return {name: move for name, move in moved.items() if move is not None}
        key, write = form
        states: list[Mapping[str, Any]] = []
        rates: list[Scalar] = []
        displacements: dict[str, Tensor] = {}
        for name, parameter in members.items():
            state = step.optimizer.state.get(parameter, {})
            if state.get(key) is not None:
                states.append(state)
                rates.append(self.options.horizon * step.lr_of(parameter))
                displacements[name] = self._buffer(self._displacements, name, parameter)
        if displacements:
            write(list(displacements.values()), states, group, rates)
        return displacements

    def _predict_from_displacement(
        self, name: str, parameter: nn.Parameter, step: Step
    ) -> Tensor | None:
        """Scale the last step by the change of the learning rate; keep the weights for the next."""
        self._buffer(self._before, name, parameter).copy_(local(parameter))
        self._noted.add(name)
        if name not in self._last:
            return None
        ratio = _ratio(step.lr_of(parameter), self._last_rates[name], local(parameter).device)
        if ratio is None:
            return None
        out = self._buffer(self._displacements, name, parameter)
        return torch.mul(self._last[name].to(out), self.options.horizon * ratio, out=out)

    def after_step(self, step: Step) -> None:
        """Keep what the step did, where the displacement form needs it."""
        for name, parameter in step.named_parameters():
            if name in self._noted:
                self._keep_step(name, parameter, step)
            else:
                self._last.pop(name, None)
        self._noted.clear()

    def _keep_step(self, name: str, parameter: nn.Parameter, step: Step) -> None:
        """Keep the step of one parameter, without decoupled decay, and its rate."""
        rate = step.lr_of(parameter)
        before = self._before[name]
        last = self._buffer(self._last, name, parameter)
        torch.sub(local(parameter.detach()), before, out=last)
        decay = self.options.decoupled_decay
        if decay is None:
            decay = decoupled_decay(step.optimizer, step.group_of(parameter))
        if decay:
            # Only where a step was made: a parameter without a gradient was not decayed either.
            decayed = torch.where(last == 0, 0, before)
            factor = torch.as_tensor(rate * decay, dtype=last.dtype, device=last.device)
            last.addcmul_(decayed, factor)
        self._last_rates[name] = rate.clone() if isinstance(rate, Tensor) else rate

    @staticmethod
    def _buffer(buffers: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return a tensor like the local part of `parameter`, kept from step to step."""
        part = local(parameter)
        kept = buffers.get(name)
        fits = (
            kept is not None
            and kept.shape == part.shape
            and kept.dtype == part.dtype
            and kept.device == part.device
        )
        if not fits:
            buffers[name] = torch.empty_like(part, requires_grad=False)
        return buffers[name]

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return Nesterov's momentum, which this is up to the horizon on SGD; NAdam on Adam."""
        return nesterov_control(optimizer)

    def idle_reason(self) -> str:
        """Say why no weight may have moved."""
        if self.options.horizon == 0:
            return "horizon is 0"
        return "no parameter had a last step to predict from (was the learning rate 0 throughout?)"

    def state_dict(self) -> dict[str, Any]:
        """Return the last displacements and their rates, where the displacement form is in use."""
        return {
            "last": {name: last.clone() for name, last in self._last.items()},
            "last_rates": dict(self._last_rates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the last displacements and their rates."""
        self._last = {name: tensor.clone() for name, tensor in state["last"].items()}
        self._last_rates = dict(state["last_rates"])
        self._noted.clear()


def _warn_of_unknown_decay(optimizer: Optimizer) -> None:
    """Warn where the displacement form meets a decay that may be decoupled."""
    for group in optimizer.param_groups:
        if (
            state_form(optimizer, group) is not None
            or decoupled_decay(optimizer, group) is not None
        ):
            continue
        warnings.warn(
            f"{type(optimizer).__name__} has a weight_decay that may be decoupled; pass "
            "decoupled_decay=… (0 where the decay is added to the gradient), which 'xgrad' takes "
            "to be 0 now",
            RegradWarning,
            stacklevel=3,
        )
        return


def _ratio(rate: Scalar, last_rate: Scalar, device: torch.device) -> Scalar | None:
    """Return rate / last_rate; 0 or None if the last rate was 0, whose step tells nothing."""
    if isinstance(rate, Tensor) or isinstance(last_rate, Tensor):
        divisor = torch.as_tensor(last_rate)
        divisor = torch.where(divisor == 0, torch.inf, divisor)
        return rate / divisor.to(device)
    return None if last_rate == 0 else rate / last_rate
