"""GC-W: an offset on weight gradients, learned from how earlier offsets agreed with later gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from regrad import Attachment, Correction
from regrad.correction import Control, Needs
from regrad.errors import refuse_if
from regrad.hookspecs import Step
from regrad.optimizers import first_moment_key, looks_ahead, nesterov_control
from regrad.sharding import local
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_gcw.functional import HIGHEST, LOWEST, offset
from regrad_gcw.selection import convolutions_of, matches, stage_ends
from regrad_gcw.slots import DECAYS, Memory, fit


class GCW(Correction):
    r"""Add a learned offset to the gradients of the layers before each down-sampling (experimental).

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
            the momentum, :math:`\beta_1`, or 0 where the optimizer has neither.
        predictor: "slot", "attention", or "prior" (nothing is learned).
        fit_target: Fit to the "next" gradient, or in "hindsight" to the mean of the
            `fit_every` gradients that follow.
        target: "moment" corrects the first moment where the optimizer has one that is
            known, `.grad` elsewhere; "gradient" always `.grad`.
        norm: "keep" rescales ĝ to the norm of g, "free" does not.
        gate: Whether the gate may go back to the prior, or switch off.
        warmup_steps: Optimizer steps in which ĝ = g. At least 0.
        fit_every: K, steps per window. At least 1.
        allow_double_lookahead: Permit an optimizer that takes a Nesterov step itself
            (`nesterov=True`, NAdam), or a second correction that looks ahead.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, on an optimizer that already looks ahead, on names that
            the model does not have; at attach or at the first step, on a model without
            stages.

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
        layouts=("plain", "ddp", "fsdp2"),
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
            listed = isinstance(self.layers, tuple) and self.layers != ()
            rules = (
                (
                    "layers",
                    listed or self.layers in ("stages", "all"),
                    "be 'stages', 'all' or a list of names",
                ),
                (
                    "slots",
                    0 < len(self.slots) == len({*self.slots} & {*DECAYS}),
                    f"be some of {', '.join(DECAYS)}",
                ),
                ("prior", self.prior is None or LOWEST <= self.prior <= HIGHEST, "be in [-1, 2]"),
                ("warmup_steps", self.warmup_steps >= 0, "be at least 0"),
                ("fit_every", self.fit_every >= 1, "be at least 1"),
            )
            for name, holds, rule in rules:
                if not holds:
                    raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r}")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        chosen = self.options
        shared: dict[str, Any] = {"exclusive": ()} if chosen.allow_double_lookahead else {}
        if chosen.layers != "stages":
            shared |= {"record": False, "reads": ("tensor", "moments")}
        self.needs = replace(self.needs, warmup_steps=chosen.warmup_steps, **shared)
        self._memories: dict[str, Memory] = {}
        self._stage_ends: set[Any] | None = None

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer that already looks ahead, and layers that are not there."""
        groups, layers = attachment.optimizer.param_groups, self.options.layers
        ahead = looks_ahead(attachment.optimizer)
        kind, mend = (
            type(attachment.optimizer).__name__,
            "use nesterov=False, or allow_double_lookahead=True",
        )
        ahead = ahead and not self.options.allow_double_lookahead
        refuse_if(ahead, f"'gcw' on {kind} with a Nesterov step would look ahead twice; {mend}")
        numbers = any(p.is_complex() for group in groups for p in group["params"])
        refuse_if(
            numbers,
            "'gcw' has no rule for complex parameters; train them with a separate optimizer",
        )
        names = [name for name, _ in attachment.model.named_parameters()]
        for pattern in layers if isinstance(layers, tuple) else ():
            self._refuse_layers(
                not any(matches(n, [pattern]) for n in names),
                f"must name parameters, got {pattern!r}",
            )
        if layers == "stages":
            self._refuse_layers(attachment.record is None, "must be named in a compiled model")
            self._refuse_layers(
                not convolutions_of(attachment.model), "must be named in a model without stages"
            )

    def _refuse_layers(self, condition: object, rule: str) -> None:
        weights = (name for name, p in self.attachment.model.named_parameters() if p.dim() > 1)
        refuse_if(
            condition,
            f"layers {rule}; it has {', '.join(n.removesuffix('.weight') for n in weights)}",
        )

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter is one of `layers`; of stages nothing is known before the first forward."""
        layers = self.options.layers
        if layers != "stages":
            return layers == "all" or matches(name, layers)
        if (
            self._stage_ends is None
            and self.attachment is not None
            and self.attachment.record.calls
        ):
            modules = convolutions_of(self.attachment.model)
            ends = {
                getattr(modules[end], "weight", None)
                for end in stage_ends(self.attachment.record.calls, modules)
            }
            self._stage_ends = {weight for weight in ends if isinstance(weight, nn.Parameter)}
            self._refuse_layers(not self._stage_ends, "must be named in a model without stages")
        return parameter in (self._stage_ends or ())

    def correct_gradients(self, step: Step) -> None:
        """Add the offset to `.grad` where no first moment takes it."""
        for parameter, memory in self._advanced(step, moment=False):
            if step.index >= self.options.warmup_steps:
                local(parameter.grad).add_(self._offset(parameter, memory))

    def correct_moments(self, step: Step) -> None:
        """Add the offset to the first moment, so that after its decay it counts as in the gradient."""
        for parameter, memory in self._advanced(step, moment=True):
            group, moment = step.group_of(parameter), step.optimizer.state[parameter].get("exp_avg")
            if step.index >= self.options.warmup_steps and moment is not None:
                kept = float(group["betas"][0])
                factor = (-1.0 if group.get("maximize") else 1.0) * (1 - kept) / kept
                local(moment).add_(self._offset(parameter, memory), alpha=factor)

    def _advanced(self, step: Step, *, moment: bool) -> Iterator[tuple[Any, Memory]]:
        """Take the new gradients of one kind of tensor into their memories, and yield these."""
        options = self.options
        for name, parameter in zip(step.names, step.parameters, strict=True):
            group = step.group_of(parameter)
            if (
                not self.selects(name, parameter)
                or parameter.grad is None
                or self._in_moment(step, group) != moment
            ):
                continue
            gradient = local(parameter.grad)
            if name not in self._memories:
                rows = options.fit_every if options.fit_target == "next" else None
                attention = options.predictor == "attention"
                self._memories[name] = Memory.begin(
                    gradient, self._prior(group), rows=rows, attention=attention
                )
            memory = self._memories[name].of_(parameter)
            memory.prior = self._prior(group)
            if step.index > options.warmup_steps and memory.seen:
                memory.witness(gradient)
            memory.take(gradient, [DECAYS[slot] for slot in options.slots])
            yield parameter, memory

    def _in_moment(self, step: Step, group: Mapping[str, Any]) -> bool:
        """Say whether the offset goes into a first moment, through which alone the gradient is read."""
        if self.options.target != "moment" or looks_ahead(step.optimizer):
            return False
        return first_moment_key(step.optimizer) == "exp_avg" and float(group["betas"][0]) > 0

    def _prior(self, group: Mapping[str, Any]) -> list[float]:
        """Return the coefficients before learning: the momentum on the last gradient."""
        momentum = self.options.prior
        if momentum is None:
            momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        return [float(momentum) if slot == "last" else 0.0 for slot in self.options.slots]

    def _offset(self, parameter: Any, memory: Memory) -> Tensor:
        slots, used, kept = (
            memory.tensors["history"][1:],
            memory.tensors["used"],
            self.options.norm == "keep",
        )
        return offset(local(parameter.grad), slots, used, keep_norm=kept, whole=memory.whole)

    def after_step(self, step: Step) -> None:
        """Fit coefficients and gates at the end of a window."""
        since, options = step.index - self.options.warmup_steps, self.options
        memories = (
            (self._memories.get(n), p) for n, p in zip(step.names, step.parameters, strict=True)
        )
        due = [memory.of_(parameter) for memory, parameter in memories if memory and memory.rows]
        if due and since % options.fit_every == 0:  # before the end of the warm-up nothing is due
            fit(due, predictor=options.predictor, gated=options.gate)

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return Nesterov's momentum, which the prior is, on SGD with momentum."""
        return nesterov_control(optimizer)

    def metrics(self) -> dict[str, float]:
        """Return the learned coefficients, means over the tensors, and the shares that the gate lets through."""
        names = [*(f"a_{slot}" for slot in self.options.slots), "share_learned", "share_on"]
        rows = [
            torch.cat([m.tensors["learned"], m.tensors["gate"]]).double().cpu()
            for m in self._memories.values()
        ]
        return dict(zip(names, torch.stack(rows).mean(dim=0).tolist(), strict=True)) if rows else {}

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
        """Take back what `state_dict` returned."""
        self._memories = {name: Memory.from_state(kept) for name, kept in state.items()}
