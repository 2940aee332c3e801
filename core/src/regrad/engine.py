"""Runs the corrections at their moments of the training step."""

import contextlib
import functools
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

from regrad import devices, names, other_optimizers, sharding, updates
from regrad.correction import Correction
from regrad.empty_steps import only_makes_state
from regrad.errors import RegradError, RegradWarning
from regrad.hookspecs import Layout, Step
from regrad.layouts import PlainLayout
from regrad.meter import Meter
from regrad.nesting import StepUnderWay, caller_of_hook
from regrad.optimizers import parameters_of
from regrad.parts import Parts
from regrad.progress import Progress
from regrad.registration import HookRegistry
from regrad.window import Window
from regrad.wrappers import wrap_closure

NO_FORWARD = (
    "a step ran without a training forward of the attached model: was another model attached, or "
    "was it compiled before attach()?"
)
NO_STEP = (
    "{count} training forwards of the attached model ran without a step of its optimizer "
    "({optimizer}): does another optimizer train the model, or is its step method named "
    "differently? Call attach() with the optimizer whose step() updates the weights"
)
NO_CRITERION = (
    "{name!r} corrects the criterion, but a step ran without a call to attachment.criterion; call "
    "it in the loop instead of the original"
)
OVERWRITTEN = (
    "{count} of the weights that {names} moved for the forward pass were changed before the step, "
    "the first is {first!r}: the new values are kept. Another optimizer or a hand-written update "
    "does that; call detach() before training another way. The prediction pauses until "
    "{optimizer} steps again"
)
NOT_IN_CHARGE = (
    "{other} has updated weights of the attached {optimizer} twice in a row: the prediction of "
    "{names} pauses until {optimizer} steps again; attach to the optimizer that trains, "
    "or detach()"
)
FORWARDS_WITHOUT_STEP = 50


class Engine:
    """Calls each correction alone, in order, and keeps the window, the meter and the counts.

    Args:
        model: The innermost module.
        optimizer: The innermost optimizer.
        corrections: In acting order.
        roots: The modules that the loop calls, without wrappers; by default the model.
        layers: The optimizers around `optimizer`, which step it and are no others.
        layout: How the weights lie; by default as in one process.

    Attributes:
        layout: How the weights lie, as far as is known now.
        applied: Optimizer steps that really happened.
        skipped: Steps that a scaler skipped inside a fused optimizer.
        forwards: Training forwards since the last step.
        criterion_called: Whether the corrected criterion was ever called.
        no_criterion: The warning given once if a step ran without such a call.
        seconds: Host time spent in each correction's hooks so far, by name.
        before_first_use: Called once, before the first training forward or step; None afterwards.
        before_first_step: Called once, before anything of the first step; None afterwards.
        before_every_step: What to call before anything of a step, or None.
        before_use: What to call at the next training forward or step, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        corrections: Sequence[Correction],
        *,
        roots: Sequence[nn.Module] = (),
        layers: Sequence[Any] = (),
        layout: Layout | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.corrections = corrections
        self.roots = tuple(roots) or (model,)
        self.layout: Layout = layout or PlainLayout()
        self._layers = {id(layer) for layer in (*layers, optimizer)}
        self.window = Window()
        self.meter = Meter()
        self.parts = Parts(self.before_forward, self.after_forward)
        self.applied = 0
        self.skipped = 0
        self.forwards = 0
        self.criterion_called = False
        self.no_criterion = NO_CRITERION
        self.seconds: dict[str, float] = defaultdict(float)
        self.registry = HookRegistry(corrections)
        self.registry.register(self.meter, "regrad effect meter")
        self.callers = self.registry.callers(corrections)
        self.before_first_use: Callable[[], None] | None = None
        self.before_first_step: Callable[[], None] | None = None
        self.before_every_step: Callable[[], None] | None = None
        self.before_use: Callable[[], None] | None = None

        self._names: dict[Tensor, str] = {}
        self._is_skipping = False
        self._is_ignored = False
        self._said: set[str] = set()
        self._graph_waits = False
        self._under_way = StepUnderWay()
        self._progress = Progress()
        self._gradients = updates.GradientsOfStep()
        # Of the step under way: its closure calls, and what was written before it.
        self._calls = 0
        self._versions: list[int] = []
        # When to warn or stay inactive, and the counts for that.
        self._is_paused = False
        self._other_steps = 0
        self._forwards_without_step = 0
        self._most_forwards = 0
        self._saw_forward = False

    # ---- what the corrections are given

    def step(self) -> Step:
        """Return the next optimizer step in its present state.

        Parameters may have been added since the last one.
        """
        step = Step(self.optimizer, self.applied)
        step.layout = self.layout
        if any(parameter not in self._names for parameter in step.parameters):
            self._name_parameters()
        step.names = [self._names[parameter] for parameter in step.parameters]
        step.where_to = functools.partial(self.window.where_to, step.parameters)
        return step

    def _name_parameters(self) -> None:
        """Rename the optimizer's parameters; the state of a renamed one moves with it."""
        before = self._names
        self._names = names.parameter_names(self.model, self.optimizer)
        if self.layout.own_step is not None:
            self._names |= names.names_in_groups(self.optimizer)
        renamed = {
            before[parameter]: name
            for parameter, name in self._names.items()
            if parameter in before and before[parameter] != name
        }
        if not renamed:
            return
        for correction in self.corrections:
            state = correction.state_dict()
            if names.mentions(state, renamed):
                correction.load_state_dict(names.with_new_names(state, renamed))

    @contextlib.contextmanager
    def named(self, correction: Correction, hook: str) -> Iterator[None]:
        """Add to an exception the correction and hook in which it was raised."""
        try:
            yield
        except Exception as error:
            error.add_note(f"in correction {correction.name!r}, hook {hook!r}")
            raise

    @torch.no_grad()
    def run(self, hook: str, step: Step) -> Any:
        """Call the corrections of one hook in order; return what the last one returned."""
        result = None
        for correction, call in self.callers[hook]:
            result = self._call(correction, call, hook, step)
        return result

    def _call(self, correction: Correction, call: Callable[..., Any], hook: str, step: Step) -> Any:
        """Call one correction, and count its time."""
        step.correction = correction
        start = time.perf_counter()
        with self.named(correction, hook):
            result = call(step=step)
        self.seconds[correction.name] += time.perf_counter() - start
        return result

    def is_sharded(self) -> bool:
        """Say whether this process holds only parts of parameters."""
        return self.layout.is_cut

    def is_training(self) -> bool:
        """Say whether the model is in training mode."""
        return any(root.training for root in self.roots)

    def owns(self, optimizer: Any) -> bool:
        """Say whether an optimizer is the attached one or a wrapper of it."""
        return id(optimizer) in self._layers

    def _say_once(self, message: str, **values: Any) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message.format(**values), RegradWarning, stacklevel=3)

    # ---- the forward passes

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        """Prepare for the forward of a module; count it if a root is called in training."""
        if module in self.roots and module.training and torch.is_grad_enabled():
            self._count_forward()
        self.prepare_forward(module)

    def prepare_forward(self, module: nn.Module) -> None:
        """Predict at the first training forward of a step; restore at an evaluation forward."""
        if not module.training:
            if self._graph_waits and self.window.moved:
                raise RegradError("no evaluation between forward and backward on shards")
            self.close_window()
            return
        if not torch.is_grad_enabled():
            return
        if self.before_first_use is not None:
            self._begin_use()
        if self.before_use is not None:
            self.before_use()
        self.forwards += 1
        self._saw_forward = True
        if self.callers["predict_weights"]:
            self._predict(module)

    def _begin_use(self) -> None:
        """Call what waits for the first training forward or step."""
        if self.before_first_use is not None:
            self.before_first_use()
        self.before_first_use = None

    def _count_forward(self) -> None:
        """Warn once if the attached optimizer does not step."""
        self._forwards_without_step += 1
        limit = max(FORWARDS_WITHOUT_STEP, 2 * self._most_forwards)
        if self._forwards_without_step == limit and self.corrections:
            name = type(self.optimizer).__name__
            self._say_once(NO_STEP, count=limit, optimizer=name)

    def _predict(self, module: nn.Module) -> None:
        """Move the weights, unless they are already moved or another optimizer trains them."""
        if self.window.is_open:
            if not self.window.rewritten():
                return
            self.close_window()
        if not self._is_paused:
            self._open_window(module)

    def _open_window(self, module: nn.Module) -> None:
        """Move the weights, unless that would be wrong here."""
        self._refuse_a_late_hook(module)
        self._refuse_nested("checkpoint parts of the model, or with use_reentrant=False")
        self._refuse_an_inner_evaluation()
        self.layout.moments(self.optimizer)
        step = self.step()
        self._refuse_a_second_window(step)
        moves = self.run("predict_weights", step)
        self.layout.move(functools.partial(self.window.open, step.parameters, moves))

    def _refuse_a_late_hook(self, module: nn.Module) -> None:
        """Raise if FSDP2 gathers the weights before they are moved."""
        if not self.is_sharded():
            return
        hooks_in_order = module._forward_pre_hooks.values()
        first = next(iter(hooks_in_order), None)
        if getattr(first, "function", None) not in (self.before_forward, self.parts._enter):
            raise RegradError(
                "the prediction must run before FSDP2's own hook; attach after fully_shard()"
            )

    def _refuse_an_inner_evaluation(self) -> None:
        """Raise if the optimizer evaluates the model inside its step, at weights of its own."""
        is_inside = self._under_way.contains(sys._getframe(1))
        if not is_inside or self._versions == self._count_writes():
            return
        moving = self.names_of("predict_weights")
        raise RegradError(
            f"{type(self.optimizer).__name__} evaluates the model inside its step at weights of "
            f"its own, where {moving} would move them again; use one of the two"
        )

    def _refuse_a_second_window(self, step: Step) -> None:
        """Raise if another attachment also moves parameters that were added later."""
        other = other_optimizers.moved_by_another(self, step.parameters)
        if other is not None:
            raise RegradError(
                f"{self.names_of('predict_weights')} and {other.names_of('predict_weights')} of "
                "another attachment both move the same parameters; detach() one of them"
            )

    def names_of(self, hook: str) -> str:
        """Return the names of the corrections that implement a hook, quoted."""
        return ", ".join(repr(correction.name) for correction, _ in self.callers[hook])

    def after_forward(self, _: nn.Module, inputs: Any, output: Any) -> None:
        """Under FSDP2, note that a graph waits for its backward.

        Weights that were restored before it would go unnoticed.
        """
        if not (self.window.moved and self.is_sharded()):
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._graph_waits = True
                leaf.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]

    def _begin_backward(self, _: Tensor) -> None:
        self._graph_waits = False

    def _refuse_nested(self, why: str) -> None:
        """Raise inside a backward pass, and inside the capture of a CUDA graph."""
        if torch._C._current_graph_task_id() != -1:
            raise RegradError(f"a step must not begin or end inside backward; {why}")
        if devices.is_capturing():
            raise RegradError(
                "a whole step must not be captured in a CUDA graph; "
                "capture forward and backward alone"
            )

    # ---- the window

    def close_window(self, *_: Any) -> None:
        """Restore the moved weights, except those that somebody else wrote meanwhile."""
        self._close(before_step=False)

    def _close(self, *, before_step: bool) -> None:
        """Do so, and say what was written."""
        corrected = self._with_corrected_updates() if before_step else []
        close = functools.partial(self.window.close, before_step=before_step, corrected=corrected)
        if not self.layout.restore(close):
            return
        overwritten = self.window.overwritten
        if overwritten:
            self._is_paused = True
            self._say_once(
                OVERWRITTEN,
                count=len(overwritten),
                names=self.names_of("predict_weights"),
                first=self._names.get(overwritten[0], "?"),
                optimizer=type(self.optimizer).__name__,
            )

    def before_other_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Restore the weights before another optimizer steps them.

        Returns:
            (args, kwargs) of its step with the same done after its closure, or None.
        """
        if set(parameters_of(self.optimizer)).isdisjoint(parameters_of(optimizer)):
            return None
        self.close_window()
        self._other_steps += 1
        if self._other_steps > 1 and not self._is_paused:
            self._is_paused = True
            self._say_once(
                NOT_IN_CHARGE,
                other=type(optimizer).__name__,
                optimizer=type(self.optimizer).__name__,
                names=self.names_of("predict_weights"),
            )
        return wrap_closure(args, kwargs, self.close_window)

    # ---- the step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_step_begin(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Begin a step, unless it is the `super().step()` of one that is under way."""
        is_outermost = self._under_way.begin(caller_of_hook())
        return self.before_step(optimizer, args, kwargs) if is_outermost else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_step_end(self, *_: Any) -> None:
        """End the step that `on_step_begin` began."""
        if self._under_way.end(caller_of_hook()):
            self.after_step()

    def before_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Correct now, or, if a closure computes the gradients, right after it."""
        self._refuse_nested("gradients are not final there")
        if self.before_first_use is not None:
            self._begin_use()
        if self.before_first_step is not None:
            self.before_first_step()
            self.before_first_step = None
        if self.before_every_step is not None:
            self.before_every_step()
        self._calls = 0
        wrapped = wrap_closure(args, kwargs, self.correct)
        self._is_ignored = wrapped is None and only_makes_state(self.optimizer)
        if self._is_ignored:
            self.close_window()
            return None
        if self.before_use is not None:
            self.before_use()
        if wrapped is None:
            self.correct()
        elif self.callers["predict_weights"]:
            self._versions = self._count_writes()
        return wrapped

    def _count_writes(self) -> list[int]:
        """Return how often each parameter was written."""
        return [part._version for part in sharding.locals_of(parameters_of(self.optimizer))]

    def correct(self) -> None:
        """Restore, check for a skip, unscale, then correct gradients and moments."""
        self._is_skipping = bool(getattr(self.optimizer, "found_inf", None))
        # The step of an optimizer that calls its closure again has begun already.
        self._close(before_step=not self._is_skipping and self._calls == 0)
        if self.callers["predict_weights"]:
            self._versions = self._count_writes()
        self._calls += 1
        if self._calls > 1:
            self._refuse_several_closure_calls()
        if self._is_skipping or not self.corrections:
            return
        step = self.step()
        self._refuse_sparse_gradients(step)
        self._look_for_what_is_missing(step)
        self._progress.begin(gradient for _, gradient in step.named_gradients())
        self.layout.gradients(step)
        try:
            self.layout.moments(self.optimizer)
            self._correct(step)
        finally:
            self.layout.commit(step)
            self._progress.end(gradient for _, gradient in step.named_gradients())
        if self.callers["correct_update"]:
            self._gradients.keep(step)

    def _refuse_several_closure_calls(self) -> None:
        """Raise if a correction must see one call of the closure."""
        unfit = [c.name for c in self.corrections if not c.needs.closures]
        if unfit:
            raise RegradError(
                f"{', '.join(unfit)} must see one closure call per step, got {self._calls}"
            )

    @torch.no_grad()
    def _correct(self, step: Step) -> None:
        """Do what is not done yet with these gradients."""
        self._unscale(is_done=self._progress.is_done("unscale"))
        self._progress.note("unscale")
        for hook in ("correct_gradients", "correct_moments"):
            for correction, call in self.callers[hook]:
                if not self._progress.is_done(hook, correction.name):
                    self._call(correction, call, hook, step)
                    self._progress.note(hook, correction.name)

    def _refuse_sparse_gradients(self, step: Step) -> None:
        """Raise if a correction has no rule for sparse gradients."""
        unfit = ", ".join(c.name for c in self.corrections if not c.needs.sparse)
        sparse = [name for name, gradient in step.named_gradients() if gradient.is_sparse]
        if unfit and sparse:
            raise RegradError(f"{unfit} must not see sparse gradients, got them for {sparse[:3]}")

    def _look_for_what_is_missing(self, step: Step) -> None:
        """Warn once if no forward was seen, or no call of the criterion."""
        if self.forwards == 0:
            self._look_for_parts(step)
        elif self.callers["wrap_criterion"] and not self.criterion_called:
            owner, _ = self.callers["wrap_criterion"][0]
            self._say_once(
                self.no_criterion,
                name=owner.name,
                model=type(self.model).__name__,
                optimizer=type(self.optimizer).__name__,
            )

    def _look_for_parts(self, step: Step) -> None:
        """Watch the model's parts; warn once if no forward of them was seen either."""
        if self._saw_forward or self.parts.is_watching:
            self._say_once(NO_FORWARD)
        self.parts.watch(self.roots, step.parameters)

    @torch.no_grad()
    def _unscale(self, *, is_done: bool) -> None:
        """Do for a fused optimizer what it would do itself under a GradScaler.

        Frozen parameters that have a gradient are included.

        Args:
            is_done: Whether these gradients were unscaled for a step that then raised.
        """
        scale: Any = getattr(self.optimizer, "grad_scale", None)
        if scale is None:
            return
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        if is_done:
            return
        for parameter in parameters_of(self.optimizer):
            if parameter.grad is not None:
                gradient = sharding.local(parameter.grad)
                gradient.div_(scale.to(gradient.device))

    def after_step(self, *_: Any) -> None:
        """Let corrections learn from a step that actually happened."""
        if self._is_ignored:
            self._is_ignored = False
            self.window.note_writes()
            return
        self._progress.forget()
        self._is_paused = False
        self._other_steps = 0
        self._most_forwards = max(self._most_forwards, self._forwards_without_step)
        self._forwards_without_step = 0
        self.forwards = 0
        self.parts.end_step()
        if self._is_skipping:
            self._is_skipping = False
            self.skipped += 1
            self.window.note_writes()
            return
        if self.callers["correct_update"]:
            self._correct_update()
        if self.callers["after_step"]:
            self.run("after_step", self.step())
        self.window.end_step()
        self.applied += 1
        for correction in self.corrections:
            self.meter.warn_if_idle(correction, self.applied)

    def _with_corrected_updates(self) -> list[Tensor]:
        """Return the parameters whose update is corrected."""
        acting = [correction for correction, _ in self.callers["correct_update"]]
        if not acting:
            return []
        return [
            parameter
            for name, parameter in self.step().named_parameters()
            if any(correction.selects(name, parameter) for correction in acting)
        ]

    def _correct_update(self) -> None:
        """Let corrections change what the optimizer did."""
        step = self.step()
        step.kept_gradients = self._gradients.read
        try:
            with self.window.displacements(updates.decays_in(step)) as displacements:
                step.displacements = [displacements.get(p) for p in step.parameters]
                self.run("correct_update", step)
        finally:
            self._gradients.forget()

    # ---- the checkpoint

    def window_state(self) -> dict[str, Any]:
        """Return what the window keeps of the last step, by parameter name."""
        step = self.step()
        return self.window.state_dict(dict(zip(step.parameters, step.names, strict=True)))

    def load_window_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `window_state` returned."""
        self.window.load_state_dict(state, dict(self.step().named_parameters()))

    def before_state_dict(self, *_: Any) -> None:
        """Restore the weights before they are read, where copies could not take their place."""
        if not (self.layout.is_restored_to_save and self.window.moved):
            return
        if self._graph_waits:
            raise RegradError(
                f"no state_dict() between forward and backward on layout {self.layout.name!r}"
            )
        self.close_window()

    def on_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put copies of the true weights into a state_dict taken inside the window."""
        true = self.layout.true_weights(self.window.true_weights)
        if not true:
            return
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter in true and prefix + name in state:
                state[prefix + name] = true[parameter]
