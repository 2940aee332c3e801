"""GC-W: an offset on gradients, learned from how earlier offsets agreed with later gradients."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.hooks import WRAPPER
from regrad.hookspecs import Step
from regrad.optimizers import first_moment_key, looks_ahead, nesterov_control
from regrad.sharding import local
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_gcw.functional import HIGHEST, LOWEST, offset
from regrad_gcw.selection import convolutions_of, matches, stage_ends
from regrad_gcw.slots import DECAYS, Memory, fit


class GCW(Correction):
    r"""Add a learned offset to the gradients of the layers before down-sampling (experimental).

    Per selected tensor :math:`\hat g = g + \sum_k a_k\,(g - M_k)`, with the slots
    :math:`M_1 = g_{t-1}` ("last") and two moving averages of the gradients before t
    ("fast", decay .9; "slow", decay .98). The coefficients start as the prior, the
    optimizer's momentum on "last"; every `fit_every` steps they are fitted to how
    :math:`g - M_k` agreed with the gradient that followed, and a gate per tensor chooses
    between learned, prior and no offset. On torch's Adam, AdamW, RAdam and Adamax the
    offset enters the first moment only.

    Args:
        layers: "stages" (the last convolution of every stage), "all", or names of
            parameters or their modules, with `*` and `?`.
        slots: Any of "last", "fast", "slow".
        prior: Coefficient of "last" before anything is learned, in [-1, 2]; None takes
            the momentum, :math:`\beta_1`, or 0 if the optimizer has neither.
        predictor: "slot", "attention", or "prior" (nothing is learned).
        fit_target: Fit to the "next" gradient, or in "hindsight" to the mean of the
            `fit_every` gradients that follow.
        target: "moment" corrects the first moment where it is known, and `.grad`
            elsewhere; "gradient" always corrects `.grad`.
        norm: "keep" rescales ĝ to the norm of g, "free" does not.
        gate: Whether the gate may go back to the prior or switch the offset off.
        warmup_steps: Optimizer steps in which ĝ = g. At least 0.
        fit_every: K, steps per window. At least 1.
        allow_double_lookahead: Permit an optimizer that takes a Nesterov step itself
            (`nesterov=True`, NAdam), or a second correction that looks ahead.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, on an optimizer that already looks ahead or on names
            that the model does not have; at attach or at the first step, on a model
            without stages.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> attachment = regrad.attach(model, optimizer, [GCW(layers="all")])

    References:
        Li, Ni, Li, Zhang and Gao, 2022, "Gradient Correction beyond Gradient Descent"
        (arXiv 2203.08345, withdrawn), which gives no formula and no code: slots,
        coefficients, prior and gate are ours.
    """

    name = "gcw"
    needs = Needs(
        stages=("gradient", "moment"),
        exclusive=("look-ahead",),
        after=("centralization",),
        before=("clip-norm", "clip-value", "agc"),
        record=True,
        reads=("tensor", "moments", "model"),
        conflicts={"parts": "pass layers='all'; stages are read from the whole model's forward"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Where to act, what to remember, how to learn."""

        layers: str | tuple[str, ...] = "stages"
        slots: tuple[str, ...] = tuple(DECAYS)
        prior: float | None = None
        predictor: Literal["slot", "attention", "prior"] = "slot"
        fit_target: Literal["next", "hindsight"] = "next"
        target: Literal["moment", "gradient"] = "moment"
        norm: Literal["free", "keep"] = "free"
        gate: bool = True
        warmup_steps: int = 10
        fit_every: int = 10
        allow_double_lookahead: bool = False

        def __post_init__(self) -> None:
            is_list = isinstance(self.layers, tuple) and self.layers != ()
            if not is_list and self.layers not in ("stages", "all"):
                raise ValueError(
                    f"layers must be 'stages', 'all' or a list of names, got {self.layers!r}"
                )
            known = {*self.slots} & {*DECAYS}
            if not self.slots or len(self.slots) != len(known):
                raise ValueError(f"slots must be some of {', '.join(DECAYS)}, got {self.slots!r}")
            if self.prior is not None and not LOWEST <= self.prior <= HIGHEST:
                raise ValueError(f"prior must be in [-1, 2], got {self.prior!r}")
            if self.warmup_steps < 0:
                raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps!r}")
            if self.fit_every < 1:
                raise ValueError(f"fit_every must be at least 1, got {self.fit_every!r}")

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = replace(self.needs, warmup_steps=self.options.warmup_steps)
        if self.options.allow_double_lookahead:
            self.needs = replace(self.needs, exclusive=())
        if self.options.layers != "stages":
            self.needs = replace(self.needs, record=False, reads=("tensor", "moments"))
        if self.options.target == "gradient":
            without = tuple(reading for reading in self.needs.reads if reading != "moments")
            self.needs = replace(self.needs, reads=without)
        self._memories: dict[str, Memory] = {}
        self._stage_ends: set[str] | None = None

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer that already looks ahead, and layers that are not there."""
        optimizer = attachment.optimizer
        if looks_ahead(optimizer) and not self.options.allow_double_lookahead:
            raise RegradError(
                f"'gcw' on {type(optimizer).__name__} with a Nesterov step would look ahead twice; "
                "use nesterov=False, or allow_double_lookahead=True"
            )
        for group in optimizer.param_groups:
            if any(parameter.is_complex() for parameter in group["params"]):
                raise RegradError(
                    "'gcw' has no rule for complex parameters; train them with a separate optimizer"
                )
        self._check_layers(attachment)

    def _check_layers(self, attachment: Attachment) -> None:
        """Raise `RegradError` if the model has no such layers."""
        layers = self.options.layers
        if layers == "all":
            return
        if layers == "stages":
            if attachment.record is None:
                raise self._layers_error("must be named in a compiled model")
            if not convolutions_of(attachment.model):
                raise self._layers_error("must be named in a model without stages")
            return
        names = [name for name, _ in attachment.model.named_parameters()]
        for pattern in layers:
            if not any(matches(name, [pattern]) for name in names):
                raise self._layers_error(f"must name parameters, got {pattern!r}")

    def _layers_error(self, rule: str) -> RegradError:
        """Return the error that says what layers the model has."""
        weights = [
            name.removesuffix(".weight")
            for name, parameter in self.attachment.model.named_parameters()
            if parameter.dim() > 1
        ]
        return RegradError(f"layers {rule}; it has {', '.join(weights)}")

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter is in `layers`; stages are not known before the first forward."""
        layers = self.options.layers
        if layers == "all":
            return True
        if layers != "stages":
            return matches(name, layers)
        if self._stage_ends is None:
            self._find_stage_ends()
        return self._stage_ends is not None and name in self._stage_ends

    def _find_stage_ends(self) -> None:
        """Read the stages from the record, once there is one."""
        if self.attachment is None or not self.attachment.record.calls:
            return
        convolutions = convolutions_of(self.attachment.model)
        ends = stage_ends(self.attachment.record.calls, convolutions)
        weights = {getattr(convolutions[end], "weight", None) for end in ends}
        self._stage_ends = {
            re.sub(WRAPPER, "", name)
            for name, parameter in self.attachment.model.named_parameters()
            if parameter in weights
        }
        if not self._stage_ends:
            raise self._layers_error("must be named in a model without stages")

    def correct_gradients(self, step: Step) -> None:
        """Add the offset to `.grad` if no first moment takes it."""
        for parameter, memory in self._advanced(step, moment=False):
            if step.index >= self.options.warmup_steps:
                local(parameter.grad).add_(self._offset(parameter, memory))

    def correct_moments(self, step: Step) -> None:
        """Add the offset to the first moment so that, decayed, it counts as in the gradient."""
        for parameter, memory in self._advanced(step, moment=True):
            moment = step.optimizer.state[parameter].get("exp_avg")
            if step.index < self.options.warmup_steps or moment is None:
                continue
            group = step.group_of(parameter)
            kept = float(group["betas"][0])
            sign = -1.0 if group.get("maximize") else 1.0
            factor = sign * (1 - kept) / kept
            local(moment).add_(self._offset(parameter, memory), alpha=factor)

    def _advanced(self, step: Step, *, moment: bool) -> Iterator[tuple[Any, Memory]]:
        """Add the step's gradients to their memories and yield these with their parameters.

        Args:
            step: The step.
            moment: True for the tensors whose first moment is corrected, False for those
                whose gradient is.
        """
        for name, parameter in step.named_parameters():
            if not self.selects(name, parameter) or parameter.grad is None:
                continue
            if self._corrects_moment_of(parameter, step) == moment:
                yield parameter, self._advance(name, parameter, parameter.grad, step)

    def _corrects_moment_of(self, parameter: nn.Parameter, step: Step) -> bool:
        """Say whether a parameter's first moment is corrected, not its gradient.

        That is where the gradient is read through the first moment alone.
        """
        if self.options.target != "moment" or looks_ahead(step.optimizer):
            return False
        if first_moment_key(step.optimizer) != "exp_avg":
            return False
        return float(step.group_of(parameter)["betas"][0]) > 0

    def _advance(self, name: str, parameter: nn.Parameter, gradient: Tensor, step: Step) -> Memory:
        """Add the gradient of one parameter to its memory, and return the memory."""
        gradient = local(gradient)
        prior = self._prior(step.group_of(parameter))
        if name not in self._memories:
            self._memories[name] = self._new_memory(gradient, prior)
        memory = self._memories[name].of_(parameter)
        memory.prior = prior
        if step.index > self.options.warmup_steps and memory.seen:
            memory.witness(gradient)
        memory.take(gradient, [DECAYS[slot] for slot in self.options.slots])
        return memory

    def _new_memory(self, gradient: Tensor, prior: list[float]) -> Memory:
        """Return an empty memory for a tensor."""
        is_hindsight = self.options.fit_target == "hindsight"
        return Memory.begin(
            gradient,
            prior,
            rows=None if is_hindsight else self.options.fit_every,
            attention=self.options.predictor == "attention",
        )

    def _prior(self, group: Mapping[str, Any]) -> list[float]:
        """Return the coefficients before learning: the momentum on the last gradient."""
        momentum = self.options.prior
        if momentum is None:
            momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        return [float(momentum) if slot == "last" else 0.0 for slot in self.options.slots]

    def _offset(self, parameter: Any, memory: Memory) -> Tensor:
        """Return what is added to the gradient of a parameter."""
        return offset(
            local(parameter.grad),
            memory.tensors["history"][1:],
            memory.tensors["used"],
            keep_norm=self.options.norm == "keep",
            whole=memory.whole,
        )

    def after_step(self, step: Step) -> None:
        """Fit coefficients and gates at the end of a window."""
        options = self.options
        if (step.index - options.warmup_steps) % options.fit_every != 0:
            return
        due = []
        for name, parameter in step.named_parameters():
            memory = self._memories.get(name)
            if memory is not None and memory.rows:  # none has rows before the warm-up is over
                due.append(memory.of_(parameter))
        if due:
            fit(due, predictor=options.predictor, gated=options.gate)

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return Nesterov's momentum, which the prior is on SGD; NAdam on Adam."""
        return nesterov_control(optimizer)

    def metrics(self) -> dict[str, float]:
        """Return the learned coefficients and the shares that the gate lets through, on average."""
        if not self._memories:
            return {}
        names = [*(f"a_{slot}" for slot in self.options.slots), "share_learned", "share_on"]
        rows = [
            torch.cat([memory.tensors["learned"], memory.tensors["gate"]]).double().cpu()
            for memory in self._memories.values()
        ]
        means = torch.stack(rows).mean(dim=0).tolist()
        return dict(zip(names, means, strict=True))

    def idle_reason(self) -> str:
        """Say why no gradient may have changed."""
        if not self._memories:
            return "layers matched no tensor that got a gradient"
        if not any(memory.tensors["gate"][1] for memory in self._memories.values()):
            return f"the gate switched all {len(self._memories)} tensors off"
        return "the coefficients stayed at 0 (prior 0, nothing learned)"

    def state_dict(self) -> dict[str, Any]:
        """Return copies of slots, evidence and coefficients, by parameter name."""
        return {name: memory.state() for name, memory in self._memories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._memories = {name: Memory.from_state(kept) for name, kept in state.items()}
