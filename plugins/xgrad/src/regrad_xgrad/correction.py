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
    after decoupled decay has been taken out of it where a step was made. The first step predicts nothing.

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
            groups have no learning rate that is a number.

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
        layouts=("plain", "ddp", "fsdp2"),
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

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.allow_double_lookahead:
            self.needs = with_changes(self.needs, exclusive=())
        self._displacements: dict[str, Tensor] = {}
        # The displacement form keeps the weights before the step, then the step itself and its learning rate.
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
                f"'xgrad' on {type(optimizer).__name__} with a Nesterov step would look ahead twice; "
                "use nesterov=False, or allow_double_lookahead=True"
            )
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise RegradError(
                "'xgrad' has no rule for complex parameters; train them with a separate optimizer"
            )
        moving = [group for group in optimizer.param_groups if state_form(optimizer, group) is None]
        unknown = any(decoupled_decay(optimizer, group) is None for group in moving)
        if unknown and self.options.decoupled_decay is None:
            warnings.warn(
                f"{type(optimizer).__name__} has a weight_decay that may be decoupled; pass decoupled_decay=… "
                "(0 where the decay is added to the gradient), which 'xgrad' takes to be 0 now",
                RegradWarning,
                stacklevel=2,
            )

    def predict_weights(self, step: Step) -> list[Tensor | None]:
        """Return the displacements to the predicted weights."""
        moved = {
            name: d
            for group in step.optimizer.param_groups
            for name, d in self._predict(step, group)
        }
        return [moved.get(name) for name in step.names]

    def _predict(self, step: Step, group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """Return (name, displacement) for the parameters of one group that have a direction."""
        form = state_form(step.optimizer, group)
        members = [
            (n, p)
            for n, p in zip(step.names, step.parameters, strict=True)
            if step.group_of(p) is group
        ]
        if form is None:
            return [
                item
                for name, p in members
                for item in self._predict_from_displacement(name, p, step)
            ]
        key, rule = form
        ready = [(n, p) for n, p in members if step.optimizer.state.get(p, {}).get(key) is not None]
        if ready:
            out = [self._buffer(self._displacements, n, p) for n, p in ready]
            rates = [self.options.horizon * step.lr_of(p) for _, p in ready]
            rule(out, [step.optimizer.state[p] for _, p in ready], group, rates)
        return [(n, self._displacements[n]) for n, _ in ready]

    def _predict_from_displacement(
        self, name: str, parameter: nn.Parameter, step: Step
    ) -> list[tuple[str, Tensor]]:
        """Scale the last step by the change of the learning rate, and note the weights for the next."""
        self._buffer(self._before, name, parameter).copy_(local(parameter))
        self._noted.add(name)
        if name not in self._last:
            return []
        rate, last_rate = step.lr_of(parameter), self._last_rates[name]
        if isinstance(rate, Tensor) or isinstance(last_rate, Tensor):
            safe = torch.where(
                torch.as_tensor(last_rate) == 0, torch.inf, torch.as_tensor(last_rate)
            )
            ratio: Scalar = rate / safe.to(local(parameter).device)
        elif last_rate == 0:
            return []
        else:
            ratio = rate / last_rate
        out = self._buffer(self._displacements, name, parameter)
        torch.mul(self._last[name].to(out), self.options.horizon * ratio, out=out)
        return [(name, out)]

    def after_step(self, step: Step) -> None:
        """Keep what the step did, where the displacement form needs it."""
        for name, parameter in zip(step.names, step.parameters, strict=True):
            if name not in self._noted:
                self._last.pop(name, None)
                continue
            rate = step.lr_of(parameter)
            last = self._buffer(self._last, name, parameter)
            torch.sub(local(parameter.detach()), self._before[name], out=last)
            decay = self.options.decoupled_decay
            if decay is None:
                decay = decoupled_decay(step.optimizer, step.group_of(parameter)) or 0.0
            if decay:
                # only where a step was made: a parameter without a gradient was not decayed either
                decayed = torch.where(last == 0, 0, self._before[name])
                last.addcmul_(
                    decayed, torch.as_tensor(rate * decay, dtype=last.dtype, device=last.device)
                )
            self._last_rates[name] = rate.clone() if isinstance(rate, Tensor) else rate
        self._noted.clear()

    @staticmethod
    def _buffer(buffers: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return a tensor like the local part of `parameter`, kept from step to step."""
        part, kept = local(parameter), buffers.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (
            part.shape,
            part.dtype,
            part.device,
        ):
            buffers[name] = torch.empty_like(part, requires_grad=False)
        return buffers[name]

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return Nesterov's momentum, which this is up to the horizon, on SGD with momentum."""
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
