"""GC-ODE: neural ODE branches beside the stages of a network add to hidden states' gradients."""

import copy
import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.hookspecs import Step
from regrad.meter import change_and_cosine, compare
from regrad.sharding import total_norm
from regrad.signatures import takes
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from regrad_gcode.branch import Solver
from regrad_gcode.functional import add_flow, pull_back, scale_flow
from regrad_gcode.pair import Pair, Passage, Shape
from regrad_gcode.selection import Stage, find_stages

WHOLE = "'gcode' must see whole stages; checkpoint them whole, or with use_reentrant=False"
UNCOUNTED = "FSDP2 hides the gradients that show which micro-batches belong to a step"
UNSEEN = "'gcode' saw no forward of a stage; do not replace modules after attach()"


class GCODE(Correction):
    r"""Add the gradient flow of neural ODE branches to hidden states (experimental).

    Beside each stage :math:`h_{i-1} \to h_i` a branch
    :math:`b_i = ODESolve(\varphi_i, P_i(h_{i-1}), t: 0 \to 1)` learns to follow it. The forward
    pass does not change; in the backward pass, with :math:`g_i = dL/dh_i`,

    .. math:: dL/dh_{i-1} = J_{stage}^\top g_i + \lambda\, J_{branch}^\top g_i.

    Args:
        weight: :math:`\lambda` after the warm-up. At least 0.
        warmup_steps: Optimizer steps over which :math:`\lambda` grows linearly, from 0 in
            the first step. At least 1.
        fit_every: Optimizer steps per fit of the branches. At least 1.
        learning_rate: Learning rate of the branches' own Adam. Positive.
        solver: Name of torchdiffeq's method.
        adjoint: Whether :math:`J_{branch}^\top g` solves the adjoint equation.
        norm: "keep" rescales each sample of the sum to its uncorrected norm.
        flow: "branch"; or "scale", the control: each sample of :math:`J_{stage}^\top g_i`
            scaled to the norm that the sum would have.
        stages: Names of modules in the order in which they are called; the input of the
            first one is h_0. Empty: found in the network.
        seed: Seed of the branches' weights.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, on a compiled model or unknown names; at the first training
            forward, on a network with fewer than two stages.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 8, 2, 2)
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attachment = regrad.attach(model, optimizer, [GCODE(weight=0.2)])

    References:
        Li, Ni, Li, Zhang and Gao, 2022, "Gradient Correction beyond Gradient Descent"
        (arXiv 2203.08345, withdrawn), which gives no formula and no code; field, projection,
        injection, fit and ramp are ours.
    """

    name = "gcode"
    needs = Needs(
        stages=("hidden",),
        record=True,
        conflicts={"fsdp2": UNCOUNTED},
        reads=("model", "micro"),
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        """How strongly, how the branches learn, and where."""

        weight: float = 0.1
        warmup_steps: int = 400
        fit_every: int = 4
        learning_rate: float = 1e-3
        solver: Solver = "midpoint"
        adjoint: bool = False
        norm: Literal["free", "keep"] = "free"
        flow: Literal["branch", "scale"] = "branch"
        stages: tuple[str | int, ...] = ()
        seed: int = 0

        def __post_init__(self) -> None:
            if not 0 <= self.weight < torch.inf:
                raise ValueError(f"weight must be at least 0 and finite, got {self.weight!r}")
            if self.warmup_steps < 1:
                raise ValueError(f"warmup_steps must be at least 1, got {self.warmup_steps!r}")
            if self.fit_every < 1:
                raise ValueError(f"fit_every must be at least 1, got {self.fit_every!r}")
            if not 0 < self.learning_rate < torch.inf:
                raise ValueError(
                    f"learning_rate must be positive and finite, got {self.learning_rate!r}"
                )
            if self.flow == "scale" and self.norm != "free":
                raise ValueError(
                    f"norm must be 'free' with flow='scale', the control, got {self.norm!r}"
                )
            if len(self.stages) == 1 or len({*self.stages}) < len(self.stages):
                raise ValueError(f"stages must be two or more different names, got {self.stages!r}")
            if self.seed < 0:
                raise ValueError(f"seed must be at least 0, got {self.seed!r}")

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = dataclasses.replace(self.needs, warmup_steps=self.options.warmup_steps)
        self._pairs: dict[str, Pair] = {}
        self._kept: Mapping[str, Any] = {}
        self._passages: weakref.WeakSet[Passage] = weakref.WeakSet()
        self._forwards = 0
        self._task = -1

    def setup(self, attachment: Attachment) -> None:
        """Refuse models without visible stages; branches come with the first forward or a state."""
        if attachment.record is None:
            raise RegradError("'gcode' must see the stages of a model that is not compiled")
        modules = dict(attachment.model.named_modules())
        unknown = [name for name in map(str, self.options.stages) if name not in modules]
        if unknown:
            raise RegradError(
                f"stages must name modules of the model, got {unknown}; it has {', '.join(modules)}"
            )
        attachment.hook_forward(attachment.model, self._after_forward)
        kept = self.state_dict()
        self._pairs = {}
        self._forwards = 0
        self.load_state_dict(kept)

    def _acts(self) -> bool:
        """Say whether this forward is one of training."""
        if self.attachment is None or not self.attachment.model.training:
            return False
        return torch.is_grad_enabled()

    def _after_forward(self, _: nn.Module, __: Any, output: Any) -> None:
        """Build the branches when the first training forward has shown the stages."""
        if not self._acts():
            return
        if not self._pairs:
            self._find()
        if self._forwards == 0:
            note = f"'gcode' sees the stages {', '.join(self._pairs)}"
            self.attachment.reasons = (*self.attachment.reasons, note)
        self._forwards += 1
        if self._fits(self.attachment.engine.applied):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def _find(self) -> None:
        """Make the pairs of the stages that were named, or that the record shows."""
        calls = self.attachment.record.calls
        stages = [Stage(str(name), str(name)) for name in self.options.stages]
        if not stages:
            modules = self.attachment.model.named_modules()
            convolutions = [name for name, module in modules if isinstance(module, nn.Conv2d)]
            stages = find_stages(calls, convolutions)
        if len(stages) < 2:
            found = ", ".join(stage.last for stage in stages) or "none"
            raise RegradError(
                f"'gcode' must find two stages or more, found {found}; name them with stages=[…]"
            )
        first_inputs = {call.name: call.inputs[:1] for call in reversed(calls)}
        first_outputs = {call.name: call.outputs[:1] for call in reversed(calls)}
        for stage in stages:
            shapes = (*first_inputs.get(stage.first, ()), *first_outputs.get(stage.last, ()))
            if [len(shape) for shape in shapes] != [4, 4]:
                raise RegradError(
                    "stages must take and return images [B, C, H, W]; "
                    f"{stage.last!r} takes and returns {shapes}"
                )
            self._build(stage, (shapes[0][1:], shapes[1][1:]))

    def _build(self, stage: Stage, shapes: tuple[Shape, Shape]) -> None:
        """Make the pair of a stage and hook it."""
        model = self.attachment.model
        first = model.get_submodule(stage.first)
        last = model.get_submodule(stage.last)
        name = stage.first if stage.first == stage.last else f"{stage.first}..{stage.last}"
        like = next(last.parameters(), next(model.parameters()))
        seed = self.options.seed + len(self._pairs)
        pair = Pair(name, shapes, self.options, seed, like)
        self._pairs[name] = pair
        self.attachment.hook_forward(first, partial(self._enter, pair))
        self.attachment.hook_forward(last, partial(self._leave, pair))

    def _enter(self, pair: Pair, _: nn.Module, inputs: Any, __: Any) -> None:
        """Keep what goes into the stage."""
        pair.entered = next(iter(tree_leaves(inputs)), None) if self._acts() else None

    def _leave(self, pair: Pair, _: nn.Module, __: Any, output: Any) -> None:
        """Let the backward of this forward through the stage inject, once."""
        if not self._acts():
            return
        before = pair.entered
        after = tree_leaves(output)[0]
        pair.entered = None
        if before is None:
            if self._forwards > 1 and pair.passages == 0:
                raise RegradError(WHOLE)
            return
        pair.passages += 1
        if not (before.requires_grad and after.requires_grad):
            return
        if _is_repeated(pair, get_gradient_edge(before)):
            return
        end = get_gradient_edge(after)
        sample = None
        if self._fits(self.attachment.engine.applied):
            # Copies, since later code may write in place.
            sample = (before.detach().clone(), after.detach().clone())
        passage = Passage(before.detach(), end.output_nr, after._is_view(), sample)
        self._passages.add(passage)
        # A tensor's hooks run in the order in which they were registered, those of its node after
        # them. Only there is the gradient complete: the next pair injects by a hook of the same
        # tensor, which is registered later.
        end.node.register_prehook(partial(self._keep, pair, passage))
        before.register_hook(partial(self._inject, pair, passage))  # type: ignore[no-untyped-call]

    def _begin(self, _: Tensor) -> None:
        """Forget earlier micro-batches if no gradient of theirs is left: their step is over."""
        last = self._task
        self._task = torch._C._current_graph_task_id()
        if self._task == last or self.attachment is None:
            return
        parameters = self.attachment.model.parameters()
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        for pair in self._pairs.values():
            pair.forget(norm == 0)

    def _keep(self, pair: Pair, passage: Passage, gradients: Sequence[Tensor | None]) -> None:
        """Take the complete gradient, with what the next pair adds to it, and what a fit needs."""
        passage.gradient = gradients[passage.index]
        sample = passage.sample
        passage.sample = None
        if sample is not None and self.attachment is not None:
            pair.collect(*sample)

    def _inject(self, pair: Pair, passage: Passage, gradient: Tensor) -> Tensor | None:
        """Return the gradient of h before the stage with the branch's part."""
        following = passage.gradient
        passage.gradient = None
        if passage.hidden is None or self.attachment is None or not self._strength():
            return None
        if following is None:
            if passage.is_view:  # torch drops the hooks of a view that is written to
                raise RegradError(
                    f"stage {pair.name!r} ends in a view that is written in place; "
                    "copy it, or name other stages"
                )
            return None
        flow = pull_back(pair.branch, passage.hidden, following, dtype=pair.dtype)
        extra = self._strength() * flow
        if self.options.flow == "scale":
            corrected = scale_flow(gradient, extra)
        else:
            corrected = add_flow(gradient, extra, keep_norm=self.options.norm == "keep")
        engine = self.attachment.engine
        if engine.meter.due(self, engine.applied):
            pair.witnessed = gradient.detach(), corrected
        if engine.meter.detail is not None:  # an explanation has no step to wait for
            self._witness()
        return corrected

    def _strength(self) -> float:
        """Return the weight of the branches in this step."""
        share = min(1.0, self.attachment.engine.applied / self.options.warmup_steps)
        return float(self.options.weight * share)

    def _fits(self, index: int) -> bool:
        """Say whether a step fits the branches; the first one builds them."""
        return index > 0 and (index + 1) % self.options.fit_every == 0

    def _witness(self) -> None:
        """Report what was measured in backward to the meter, now that the step counts."""
        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        for name, pair in self._pairs.items():
            if pair.witnessed is None:
                continue
            before[name], after[name] = pair.witnessed
            pair.witnessed = None
            row = compare([before[name]], [after[name]])[0]
            pair.seen["cosine"] = change_and_cosine(row)[1]
            pair.seen["norm_ratio"] = row[3] / row[2].clamp_min(1e-19)
        self.attachment.engine.meter.observe(self.name, "hidden", before, after)

    def after_step(self, step: Step) -> None:
        """Fit the branches when due, and release what the step held."""
        if self._forwards > 1 and not any(pair.passages for pair in self._pairs.values()):
            raise RegradError(UNSEEN)
        self._witness()
        if self._fits(step.index):
            for pair in self._pairs.values():
                pair.fit()
        for passage in self._passages:
            passage.hidden = None

    def control(self, optimizer: torch.optim.Optimizer) -> Control | None:
        """Return the same gradients, scaled as the branches scale them; None if norms are kept."""
        if self.options.flow == "scale" or self.options.norm == "keep":
            return None
        scaled = type(self)(**vars(self.options) | {"flow": "scale"})
        return Control(name="scaled-flow", corrections=(scaled.as_text(),))

    def metrics(self) -> dict[str, float]:
        """Return by pair how the corrected gradient compares with the stage's, and the last fit."""
        numbers: dict[str, float] = {}
        for name, pair in self._pairs.items():
            for key, value in pair.seen.items():
                numbers[f"{key}_{name}"] = value.item()
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the branches and their Adam states, by stage."""
        if not self._pairs:
            return copy.deepcopy(dict(self._kept))
        return {name: pair.state() for name, pair in self._pairs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; before attach it is kept until then."""
        self._kept = state
        if self.attachment is None:
            return
        if not self._pairs:
            for name, kept in state.items():
                stage = Stage(name.partition("..")[0], name.rpartition("..")[2])
                self._build(stage, kept["shapes"])
        if state and {*state} != {*self._pairs}:
            stages = ", ".join(self._pairs)
            raise RegradError(f"state must be for the stages {stages}, got {', '.join(state)}")
        for name, kept in state.items():
            self._pairs[name].load(kept)


def _is_repeated(pair: Pair, origin: GradientEdge) -> bool:
    """Say whether a checkpoint runs the stage again in backward; mark a first forward."""
    mark = f"gcode {id(pair)} {origin.output_nr}"
    marks = cast("dict[str, bool]", origin.node.metadata)
    if mark in marks and torch._C._current_graph_task_id() != -1:
        return True
    marks[mark] = True
    return False
