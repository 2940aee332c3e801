"""Runs the corrections at their moments of the training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pluggy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad.correction import Correction
from regrad.errors import RegradError, RegradWarning
from regrad.hooks import wrap_closure
from regrad.hookspecs import HOOKS, CorrectionSpec
from regrad.meter import Meter
from regrad.sharding import is_sharded, locals_of
from regrad.step import ParameterNames, Step
from regrad.window import Window


class HookRegistry(pluggy.PluginManager):
    """pluggy's registry, in which corrections implement hooks by name and observers only wrap them."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of one implementation; raise `RegradError` where its kind is not allowed."""
        marked: Any = super().parse_hookimpl_opts(plugin, name)
        if not isinstance(plugin, Correction):
            if marked and not marked["wrapper"]:
                raise RegradError(f"observer {plugin!r} must mark {name!r} with hookimpl(wrapper=True)")
            return marked
        for option in ("wrapper", "hookwrapper", "tryfirst", "trylast"):
            if marked and marked[option]:
                raise RegradError(
                    f"correction {plugin.name!r} must not mark {name!r} with {option}; declare before/after"
                )
        return {} if marked is None and name in HOOKS else marked


class Engine:
    """Calls each correction alone, in order, and keeps the window, the meter and the counts.

    Args:
        model: The innermost module.
        optimizer: The innermost optimizer.
        corrections: In acting order.

    Attributes:
        applied: Optimizer steps that really happened.
        skipped: Steps that a scaler skipped inside a fused optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, corrections: Sequence[Correction]) -> None:
        self.model, self.optimizer, self.corrections = model, optimizer, corrections
        self.window, self.meter, self.name_of = Window(), Meter(), ParameterNames(model)
        self.applied = self.skipped = 0
        self._forwards = self._closures = 0
        self._skipping = self._warned = self._graph_waits = False
        self.registry = HookRegistry("regrad")
        self.registry.add_hookspecs(CorrectionSpec)
        for correction in corrections:
            self.registry.register(correction, correction.name)
        self.registry.check_pending()
        self.registry.register(self.meter, "regrad effect meter")
        self.callers: dict[str, list[tuple[Correction, Callable[..., Any]]]] = {
            hook: [
                (c, self.registry.subset_hook_caller(hook, [other for other in corrections if other is not c]))
                for c in corrections
                if hook in c.hooks()
            ]
            for hook in HOOKS
        }

    def step(self) -> Step:
        """Return the coming optimizer step as it stands now."""
        return Step(self.optimizer, self.name_of, self.applied)

    @torch.no_grad()
    def run(self, hook: str, step: Step) -> Any:
        """Call the corrections of one hook in order; return what the last one returned."""
        result = None
        for correction, call in self.callers[hook]:
            step.correction = correction
            result = call(step=step)
        return result

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        """Predict at the first training forward of a step; restore at an evaluation forward."""
        if not module.training:
            return self.close_window(forward=True)
        if not torch.is_grad_enabled():
            return None
        self._forwards += 1
        if self.callers["predict_weights"] and not self.window.is_open:
            step = self.step()
            sharded = any(map(is_sharded, step.parameters))
            hook = next(iter(module._forward_pre_hooks.values()))
            if sharded and getattr(hook, "function", None) != self.before_forward:
                raise RegradError("the prediction must run before FSDP2's own hook; attach after fully_shard()")
            if self.window.open(step.parameters, self.run("predict_weights", step)) and sharded:
                self._reshard()
        return None

    def after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Under FSDP2, note that a graph waits for its backward: a restore before it would go unnoticed."""
        if module.training and isinstance(output, Tensor) and output.requires_grad and self.window.moved:
            self._graph_waits = is_sharded(self.optimizer.param_groups[0]["params"][0])
            if self._graph_waits:
                output.register_hook(self._backward_began)

    def _backward_began(self, _: Tensor) -> None:
        self._graph_waits = False

    def close_window(self, *_: Any, forward: bool = False) -> None:
        """Restore the weights if they are moved."""
        if forward and self._graph_waits and self.window.moved:
            raise RegradError("evaluation between forward and backward is wrong under FSDP2; call backward() first")
        parameters = list(self.window.moved)
        if self.window.close() and any(map(is_sharded, parameters)):
            self._reshard()

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - heavy, and only shards need it

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Correct now, or, where a closure computes the gradients, right after it."""
        if torch._C._current_graph_task_id() != -1:
            raise RegradError("the optimizer must not be stepped inside backward; gradients are not final there")
        wrapped = wrap_closure(args, kwargs, self._after_closure)
        if wrapped is None:
            self._correct()
        return wrapped

    def _after_closure(self) -> None:
        self._closures += 1
        unfit = [c.name for c in self.corrections if not c.needs.closures]
        if self._closures > 1 and unfit:
            raise RegradError(f"{', '.join(unfit)} must see one closure call per step, got {self._closures}")
        self._correct()

    def _correct(self) -> None:
        """Restore, check for a skip, unscale, then correct gradients and moments."""
        self.close_window()
        if not self.corrections:
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._skipping = found_inf is not None and bool(found_inf != 0)
        if self._skipping:
            return
        step = self.step()
        self._unscale([g for g in step.gradients if g is not None])
        self._warn_without_forward()
        self._refuse_sparse(step)
        self.run("correct_gradients", step)
        self.run("correct_moments", step)

    @torch.no_grad()
    def _unscale(self, gradients: list[Tensor]) -> None:
        scale: Any = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            for gradient in locals_of(gradients):
                gradient.div_(scale.to(gradient.device))
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _warn_without_forward(self) -> None:
        if self._forwards == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "an optimizer step came without a training forward of the attached model: was another module attached, "
                "or a compiled train function called before attach()?",
                RegradWarning,
                stacklevel=2,
            )

    def _refuse_sparse(self, step: Step) -> None:
        unfit = [c.name for c in self.corrections if not c.needs.sparse]
        for name, gradient in zip(step.names, step.gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided and unfit:
                raise RegradError(f"{', '.join(unfit)} has no rule for sparse gradients, got one for {name!r}")

    def after_step(self, *_: Any) -> None:
        """Let corrections learn from a step that really happened."""
        self._forwards = self._closures = 0
        if self._skipping:
            self._skipping = False
            self.skipped += 1
            return
        self.run("after_step", self.step())
        self.applied += 1
        for correction in self.corrections:
            self.meter.warn_if_idle(correction, self.applied)

    def on_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put copies of the true weights into a state_dict taken inside the window."""
        true = self.window.true_weights
        for name, parameter in module.named_parameters(remove_duplicate=False) if true else ():
            if parameter in true and prefix + name in state:
                state[prefix + name] = true[parameter]
