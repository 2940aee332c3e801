"""GC-ODE: neural ODE branches beside the stages of a network add to the gradients of hidden states."""

import copy
import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from regrad import Attachment, Correction
from regrad.correction import Control, Needs
from regrad.errors import refuse_if
from regrad.hookspecs import Step
from regrad.meter import change_and_cosine, compare
from regrad.sharding import total_norm
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrad_gcode.branch import Solver
from regrad_gcode.functional import add_flow, pull_back, scale_flow
from regrad_gcode.pair import Pair, Passage, Shape
from regrad_gcode.selection import Stage, find_stages

WHOLE = "'gcode' must see whole stages; checkpoint them whole, or with use_reentrant=False"
UNCOUNTED = "FSDP2 hides the gradients by which fits know a step's micro-batches"
UNSEEN = "'gcode' saw no forward of a stage; do not replace modules after attach()"


class GCODE(Correction):
    r"""Add the gradient flow of neural ODE branches beside the stages to hidden states (experimental).

    Beside each stage :math:`h_{i-1} \to h_i` a branch
    :math:`b_i = ODESolve(\varphi_i, P_i(h_{i-1}), t: 0 \to 1)` learns to follow it. The
    forward pass stays as it is; in the backward pass, with :math:`g_i = dL/dh_i`,

    .. math:: dL/dh_{i-1} = J_{stage}^\top g_i + \lambda\, J_{branch}^\top g_i.

    Args:
        weight: :math:`\lambda` after the warm-up. At least 0.
        warmup_steps: Optimizer steps over which :math:`\lambda` grows linearly from 0, which
            it is in the first step. At least 1.
        fit_every: Optimizer steps per fit of the branches. At least 1.
        learning_rate: Of the branches' own Adam. Positive.
        solver: torchdiffeq's method.
        adjoint: Whether :math:`J_{branch}^\top g` solves the adjoint equation.
        norm: "keep" rescales each sample of the sum to its uncorrected norm.
        flow: "branch"; or "scale", the control: each sample of :math:`J_{stage}^\top g_i`
            scaled to the norm that the sum would have.
        stages: Names of modules in the order in which they are called; the input of the
            first one is h_0. Empty: found in the network.
        seed: Of the branches' weights.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, on a compiled model or unknown names; at the first training
            forward, on a network with fewer than two stages.

    Example:
        >>> import regrad, torch
        >>> layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 8, 2, 2)]
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attachment = regrad.attach(model, optimizer, [GCODE(weight=0.2)])

    References:
        Li, Ni, Li, Zhang and Gao, 2022, "Gradient Correction beyond Gradient Descent"
        (arXiv 2203.08345, withdrawn), which gives no formula and no code: field,
        projection, injection, fit and ramp are ours.
    """

    name = "gcode"
    needs = Needs(
        stages=("hidden",),
        layouts=("plain", "ddp"),
        record=True,
        conflicts={"fsdp2": UNCOUNTED},
        reads=("model", "micro"),
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        """How strongly, how the branches learn, where."""

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
            rules = (
                ("weight", 0 <= self.weight < torch.inf, "be at least 0 and finite"),
                ("warmup_steps", self.warmup_steps >= 1, "be at least 1"),
                ("fit_every", self.fit_every >= 1, "be at least 1"),
                ("learning_rate", 0 < self.learning_rate < torch.inf, "be positive and finite"),
                (
                    "norm",
                    self.flow == "branch" or self.norm == "free",
                    "be 'free' with flow='scale', the control",
                ),
                (
                    "stages",
                    len(self.stages) == len({*self.stages}) != 1,
                    "be two or more different names",
                ),
                ("seed", self.seed >= 0, "be at least 0"),
            )
            for name, holds, rule in rules:
                if not holds:
                    raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r}")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = dataclasses.replace(self.needs, warmup_steps=self.options.warmup_steps)
        self._pairs: dict[str, Pair] = {}
        self._kept: Mapping[str, Any] = {}
        self._passages: weakref.WeakSet[Passage] = weakref.WeakSet()
        self._forwards, self._task = 0, -1

    def setup(self, attachment: Attachment) -> None:
        """Refuse what cannot be right; the branches come after the first training forward, or with a state."""
        refuse_if(
            attachment.record is None, "'gcode' must see the stages of a model that is not compiled"
        )
        modules = dict(attachment.model.named_modules())
        unknown = [name for name in map(str, self.options.stages) if name not in modules]
        refuse_if(
            unknown,
            f"stages must name modules of the model, got {unknown}; it has {', '.join(modules)}",
        )
        attachment.hook_forward(attachment.model, self._after_forward)
        kept, self._pairs, self._forwards = self.state_dict(), {}, 0
        self.load_state_dict(kept)

    def _acts(self) -> bool:
        return (
            self.attachment is not None
            and self.attachment.model.training
            and torch.is_grad_enabled()
        )

    def _after_forward(self, _: nn.Module, __: Any, output: Any) -> None:
        """Build the branches when the first training forward has shown the stages."""
        if not self._acts():
            return
        if not self._pairs:
            self._find()
        if self._forwards == 0:
            self.attachment.reasons = (
                *self.attachment.reasons,
                f"'gcode' sees the stages {', '.join(self._pairs)}",
            )
        self._forwards += 1
        for leaf in tree_leaves(output) if self._fits(self.attachment.engine.applied) else ():
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def _find(self) -> None:
        """Make the pairs of the stages that were named or that the record shows."""
        model, calls = self.attachment.model, self.attachment.record.calls
        convolutions = [
            name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
        ]
        stages = [Stage(str(name), str(name)) for name in self.options.stages] or find_stages(
            calls, convolutions
        )
        found = ", ".join(last for _, last in stages) or "none"
        refuse_if(
            len(stages) < 2,
            f"'gcode' must find two stages or more, found {found}; name them with stages=[…]",
        )
        spans = {call.name: (call.inputs[:1], call.outputs[:1]) for call in reversed(calls)}
        for first, last in stages:
            shapes = (*spans.get(first, ((), ()))[0], *spans.get(last, ((), ()))[1])
            images = [len(shape) for shape in shapes] == [4, 4]
            refuse_if(
                not images,
                f"stages must take and give images [B, C, H, W]; {last!r} takes and gives {shapes}",
            )
            self._build(Stage(first, last), (shapes[0][1:], shapes[1][1:]))

    def _build(self, stage: Stage, shapes: tuple[Shape, Shape]) -> None:
        """Make the pair of a stage and hook it."""
        model, name = self.attachment.model, "..".join(dict.fromkeys(stage))
        first, last = (model.get_submodule(part) for part in stage)
        like = next(last.parameters(), next(model.parameters()))
        pair = self._pairs[name] = Pair(
            name, shapes, self.options, self.options.seed + len(self._pairs), like
        )
        self.attachment.hook_forward(first, partial(self._enter, pair))
        self.attachment.hook_forward(last, partial(self._leave, pair))

    def _enter(self, pair: Pair, _: nn.Module, inputs: Any, __: Any) -> None:
        pair.entered = next(iter(tree_leaves(inputs)), None) if self._acts() else None

    def _leave(self, pair: Pair, _: nn.Module, __: Any, output: Any) -> None:
        """Let the backward of this forward through the stage inject, once."""
        if not self._acts():
            return
        before, after, pair.entered = pair.entered, tree_leaves(output)[0], None
        refuse_if(self._forwards > 1 and before is None and pair.passages == 0, WHOLE)
        pair.passages += before is not None
        if before is None or not (before.requires_grad and after.requires_grad):
            return
        origin, end = (torch.autograd.graph.get_gradient_edge(tensor) for tensor in (before, after))
        mark, marks = (
            f"gcode {id(pair)} {origin.output_nr}",
            cast("dict[str, bool]", origin.node.metadata),
        )
        if (
            mark in marks and torch._C._current_graph_task_id() != -1
        ):  # a checkpoint runs the stage again in backward
            return
        marks[mark] = True
        fits = self._fits(self.attachment.engine.applied)
        sample = (
            (before.detach().clone(), after.detach().clone()) if fits else None
        )  # what follows may write in place
        passage = Passage(before.detach(), end.output_nr, after._is_view(), sample)
        self._passages.add(passage)
        # Hooks of a tensor run in the order of their coming, those of its node after them: only there is
        # the gradient complete, for the next pair's injection is a hook of the same tensor and comes later.
        end.node.register_prehook(partial(self._keep, pair, passage))
        before.register_hook(partial(self._inject, pair, passage))  # type: ignore[no-untyped-call]

    def _begin(self, _: Tensor) -> None:
        """Forget earlier micro-batches if there is no gradient of theirs: their step was taken, or was skipped."""
        task, self._task = self._task, torch._C._current_graph_task_id()
        if task != self._task and self.attachment is not None:
            norm = total_norm(
                [p.grad for p in self.attachment.model.parameters() if p.grad is not None]
            )
            for pair in self._pairs.values():
                pair.forget(norm == 0)

    def _keep(self, pair: Pair, passage: Passage, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradient when it is complete, with what the next pair adds to it, and what a fit needs."""
        passage.gradient, sample, passage.sample = gradients[passage.index], passage.sample, None
        if sample is not None and self.attachment is not None:
            pair.collect(*sample)

    def _inject(self, pair: Pair, passage: Passage, gradient: Tensor) -> Tensor | None:
        """Return the gradient of h before the stage with the branch's part."""
        following, passage.gradient = passage.gradient, None
        idle = passage.hidden is None or self.attachment is None or not self._strength()
        lost = (
            not idle and following is None and passage.is_view
        )  # torch drops the hooks of a view that is written to
        refuse_if(
            lost,
            f"stage {pair.name!r} ends in a view that is written in place; copy it, or name other stages",
        )
        if idle or passage.hidden is None or following is None:
            return None
        extra = self._strength() * pull_back(
            pair.branch, passage.hidden, following, dtype=pair.dtype
        )
        scaled, kept = self.options.flow == "scale", self.options.norm == "keep"
        corrected = (
            scale_flow(gradient, extra) if scaled else add_flow(gradient, extra, keep_norm=kept)
        )
        engine = self.attachment.engine
        if engine.meter.due(self, engine.applied):
            pair.witnessed = gradient.detach(), corrected
        if engine.meter.detail is not None:  # an explanation has no step to wait for
            self._witness()
        return corrected

    def _strength(self) -> float:
        return float(
            self.options.weight
            * min(1.0, self.attachment.engine.applied / self.options.warmup_steps)
        )

    def _fits(self, index: int) -> bool:
        return index > 0 and (index + 1) % self.options.fit_every == 0  # the first step builds

    def _witness(self) -> None:
        """Tell the meter what was measured in backward, when it is known that the step counts."""
        before, after = {}, {}
        for name, pair in self._pairs.items():
            if pair.witnessed is not None:
                before[name], after[name] = pair.witnessed
                row, pair.witnessed = compare([before[name]], [after[name]])[0], None
                pair.seen["cosine"] = change_and_cosine(row)[1]
                pair.seen["norm_ratio"] = row[3] / row[2].clamp_min(1e-19)
        self.attachment.engine.meter.observe(self.name, "hidden", before, after)

    def after_step(self, step: Step) -> None:
        """Fit the branches when it is time, and let go what the step held."""
        refuse_if(
            self._forwards > 1 and not any(pair.passages for pair in self._pairs.values()), UNSEEN
        )
        self._witness()
        for pair in self._pairs.values() if self._fits(step.index) else ():
            pair.fit()
        for passage in self._passages:
            passage.hidden = None

    def control(self, optimizer: torch.optim.Optimizer) -> Control | None:
        """Return the same layers' gradients scaled as the branches scale them; none where norms are kept."""
        scales = self.options.flow == "branch" and self.options.norm == "free"
        changed = {
            key: value
            for key, value in vars(self.options).items()
            if value != getattr(self.Options, key)
        }
        written = ",".join(
            f"{name}={_written(value)}" for name, value in {**changed, "flow": "scale"}.items()
        )
        return (
            Control(name="scaled-flow", corrections=(f"{self.name}:{written}",)) if scales else None
        )

    def metrics(self) -> dict[str, float]:
        """Return per pair cosine and norm ratio of the stage's gradient and the corrected one, and the last fit."""
        return {
            f"{key}_{name}": v.item()
            for name, pair in self._pairs.items()
            for key, v in pair.seen.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the branches and their Adams, by stage."""
        return {name: pair.state() for name, pair in self._pairs.items()} or copy.deepcopy(
            dict(self._kept)
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; before attach it is kept until then."""
        self._kept = state
        if self.attachment is None:
            return
        for name, kept in state.items() if not self._pairs else ():
            self._build(Stage(name.partition("..")[0], name.rpartition("..")[2]), kept["shapes"])
        stages, got = ", ".join(self._pairs), ", ".join(state)
        refuse_if(
            state and {*state} != {*self._pairs}, f"state must be of the stages {stages}, got {got}"
        )
        for name, kept in state.items():
            self._pairs[name].load(kept)


def _written(value: Any) -> str:
    """Return an option as `regrad.create` reads it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
