"""Runs the corrections at their moments of the training step."""

import copy
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pluggy
import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

from regrad import hooks, sharding, window
from regrad.correction import HOOK_OF_STAGE, Correction
from regrad.errors import RegradWarning, refuse_if
from regrad.hookspecs import HOOKS, CorrectionSpec, Step
from regrad.meter import Meter

NO_FORWARD = "a step came without a training forward of the attached model: wrong model, or compiled before attach()?"


class HookRegistry(pluggy.PluginManager):
    """pluggy's registry, in which corrections implement hooks by name and observers only wrap them."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of one implementation; raise `RegradError` where its kind is not allowed."""
        marked: Any = super().parse_hookimpl_opts(plugin, name)
        placing = [
            o for o in ("wrapper", "hookwrapper", "tryfirst", "trylast") if marked and marked[o]
        ]
        own = isinstance(plugin, Correction)
        refuse_if(
            own and placing,
            f"{plugin!r} must not mark {name!r} with {placing}; declare before or after",
        )
        refuse_if(
            marked and not own and "wrapper" not in placing,
            f"{plugin!r} must mark {name!r} with wrapper=True",
        )
        return {} if own and marked is None and name in HOOKS else marked


class Engine:
    """Calls each correction alone, in order, and keeps the window, the meter and the counts.

    Args:
        model: The innermost module.
        optimizer: The innermost optimizer.
        corrections: In acting order.

    Attributes:
        applied: Optimizer steps that really happened.
        skipped: Steps that a scaler skipped inside a fused optimizer.
        forwards: Training forwards since the last step.
        seconds: Host time spent in each correction's hooks so far, by name.
        before_first_step: Called once, before anything of the first step; None afterwards.
    """

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, corrections: Sequence[Correction]
    ) -> None:
        self.model, self.optimizer, self.corrections = model, optimizer, corrections
        self.window, self.meter = window.Window(), Meter()
        self._names: dict[Tensor, str] = {}
        self.applied = self.skipped = self.forwards = self._calls = 0
        self._skipping = self._warned = self._graph_waits = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.before_first_step: Callable[[], None] | None = None
        self.registry = HookRegistry("regrad")
        self.registry.add_hookspecs(CorrectionSpec)
        for correction in corrections:
            self.registry.register(correction, correction.name)
        self.registry.check_pending()
        self.registry.register(self.meter, "regrad effect meter")
        self.callers: dict[str, list[tuple[Correction, Callable[..., Any]]]] = {
            hook: [] for hook in HOOKS
        }
        acting = {
            c: {"setup", "after_step", *(HOOK_OF_STAGE[s] for s in c.needs.stages)}
            for c in corrections
        }
        for c, hook in (
            (c, hook)
            for c in corrections
            for hook in HOOKS
            if hook in acting[c] and hasattr(c, hook)
        ):
            others = [
                other for other in corrections if other is not c
            ]  # a caller reaches one correction: design §3
            self.callers[hook].append((c, self.registry.subset_hook_caller(hook, others)))

    def step(self) -> Step:
        """Return the coming optimizer step as it stands now; parameters may have come since the last."""
        step = Step(self.optimizer, self.applied)
        if any(p not in self._names for p in step.parameters):
            self._names |= {
                p: re.sub(hooks.WRAPPER, "", name) for name, p in self.model.named_parameters()
            }
        step.names = [
            self._names.setdefault(p, f"unnamed.{i}") for i, p in enumerate(step.parameters)
        ]
        return step

    @torch.no_grad()
    def run(self, hook: str, step: Step) -> Any:
        """Call the corrections of one hook in order; return what the last one returned."""
        result = None
        for step.correction, call in self.callers[hook]:
            start = time.perf_counter()
            result = call(step=step)
            self.seconds[step.correction.name] += time.perf_counter() - start
        return result

    def is_sharded(self) -> bool:
        """Say whether any parameter is a shard now."""
        return any(
            sharding.is_sharded(p) for group in self.optimizer.param_groups for p in group["params"]
        )

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        """Predict at the first training forward of a step; restore at an evaluation forward."""
        if not module.training:
            refuse_if(
                self._graph_waits and self.window.moved,
                "no evaluation between forward and backward under FSDP2",
            )
            self.close_window()
        elif torch.is_grad_enabled():
            self.forwards += 1
            if self.callers["predict_weights"] and not self.window.is_open:
                self._open_window(module)

    def _open_window(self, module: nn.Module) -> None:
        first = next(iter(module._forward_pre_hooks.values()))
        hidden = self.is_sharded() and getattr(first, "function", None) != self.before_forward
        refuse_if(
            hidden, "the prediction must run before FSDP2's own hook; attach after fully_shard()"
        )
        self._refuse_nested("checkpoint parts of the model, or with use_reentrant=False")
        sharding.reduce_states(self.optimizer)
        step = self.step()
        if self.window.open(step.parameters, self.run("predict_weights", step)):
            self._reshard()

    def after_forward(self, _: nn.Module, inputs: Any, output: Any) -> None:
        """Under FSDP2, note that a graph waits for its backward: a restore before it would go unnoticed."""
        for leaf in tree_leaves(output) if self.window.moved and self.is_sharded() else ():
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._graph_waits = True
                leaf.register_hook(lambda _: setattr(self, "_graph_waits", False))  # type: ignore[no-untyped-call]

    def _refuse_nested(self, why: str) -> None:
        refuse_if(
            torch._C._current_graph_task_id() != -1,
            f"a step must not begin or end inside backward; {why}",
        )
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
        refuse_if(
            captured,
            "a whole step must not be captured in a CUDA graph; capture forward and backward alone",
        )

    def close_window(self, *_: Any) -> None:
        """Restore the weights if they are moved."""
        if self.window.close():
            self._reshard()

    def _reshard(self) -> None:
        """Make FSDP2 gather the weights anew."""
        if self.is_sharded():
            from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - heavy, and only shards need it

            for module in (m for m in self.model.modules() if isinstance(m, FSDPModule)):
                module.reshard()

    def before_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Correct now, or, where a closure computes the gradients, right after it."""
        self._refuse_nested("gradients are not final there")
        if self.before_first_step is not None:
            self.before_first_step()
            self.before_first_step = None
        self._calls = 0
        wrapped = hooks.wrap_closure(args, kwargs, self.correct)
        if wrapped is None:
            self.correct()
        return wrapped

    def correct(self) -> None:
        """Restore, check for a skip, unscale, then correct gradients and moments."""
        self.close_window()
        self._calls += 1
        unfit = [c.name for c in self.corrections if not c.needs.closures and self._calls > 1]
        refuse_if(
            unfit, f"{', '.join(unfit)} must see one closure call per step, got {self._calls}"
        )
        self._skipping = bool(getattr(self.optimizer, "found_inf", None))
        if self._skipping or not self.corrections:
            return
        step = self.step()
        self._check(step)
        sharding.reduce_gradients(step.parameters)
        sharding.reduce_states(self.optimizer)
        self._unscale()
        self.run("correct_gradients", step)
        self.run("correct_moments", step)

    def _check(self, step: Step) -> None:
        """Refuse sparse gradients without a rule; warn once where no training forward was seen."""
        unfit = ", ".join(c.name for c in self.corrections if not c.needs.sparse)
        sparse = [
            n
            for n, g in zip(step.names, step.gradients, strict=True)
            if g is not None and g.is_sparse
        ]
        refuse_if(
            unfit and sparse, f"{unfit} must not see sparse gradients, got them for {sparse[:3]}"
        )
        if self.forwards == 0 and not self._warned:
            self._warned = True
            warnings.warn(NO_FORWARD, RegradWarning, stacklevel=2)

    @torch.no_grad()
    def _unscale(self) -> None:
        """Take over from a fused optimizer what it would do itself under a GradScaler, frozen parameters included."""
        scale: Any = getattr(self.optimizer, "grad_scale", None)
        gradients = (
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        )
        for gradient in sharding.locals_of(gradients) if scale is not None else ():
            gradient.div_(scale.to(gradient.device))
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def after_step(self, *_: Any) -> None:
        """Let corrections learn from a step that really happened."""
        self.forwards = 0
        if self._skipping:
            self._skipping, self.skipped = False, self.skipped + 1
            return
        self.run("after_step", self.step())
        self.applied += 1
        for correction in self.corrections:
            self.meter.warn_if_idle(correction, self.applied)

    def on_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put copies of the true weights into a state_dict taken inside the window."""
        true = self.window.true_weights()
        for name, parameter in module.named_parameters(remove_duplicate=False) if true else ():
            if parameter in true and prefix + name in state:
                state[prefix + name] = true[parameter]


class SwitchingCriterion:
    """Calls the corrected criterion while the attached model is in training mode, else the original.

    Args:
        engine: Says whether the model trains, and which steps are measured.
        owner: The correction that made `corrected`.
        original: The user's criterion.
        corrected: What the correction made of it; None after detach.
    """

    def __init__(self, engine: Engine, owner: Correction, original: Any, corrected: Any) -> None:
        self._engine, self._owner, self.original, self.corrected = (
            engine,
            owner,
            original,
            corrected,
        )

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss, as the criterion does."""
        if self.corrected is None or not self._engine.model.training:
            return self.original(*arguments, **options)
        watched = arguments and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if watched and self._engine.meter.due(self._owner, self._engine.applied):
            self._measure(*arguments, **options)
        return self.corrected(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original if hasattr(self.original, name) else self.corrected, name)

    def __reduce__(self) -> Any:  # a copy is the plain criterion
        return copy.copy, (self.original,)

    def _measure(self, logits: Tensor, *rest: Any, **options: Any) -> None:
        """Compare the logit gradients of both criteria."""
        leaves = [logits.detach().requires_grad_() for _ in range(2)]
        with torch.random.fork_rng([logits.device] if logits.is_cuda else []):
            pairs = zip((self.original, self.corrected), leaves, strict=True)
            values = [criterion(leaf, *rest, **options).sum() for criterion, leaf in pairs]
        gradients = torch.autograd.grad(values, leaves)
        self._engine.meter.observe(
            self._owner.name, "criterion", *({"logits": sharding.local(g)} for g in gradients)
        )
