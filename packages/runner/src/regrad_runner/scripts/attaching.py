"""Attach corrections automatically to the optimizers of a script, before their first step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import regrad
from regrad import Attachment, RegradError, RegradWarning, inside, registry
from regrad.correction import Control
from regrad.engine import Engine
from regrad.inside import CrossEntropyInside
from regrad.optimizers import parameters_of
from regrad.refusals import ATTACHED
from regrad.wrappers import innermost_module, wrap_closure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from regrad_runner.scripts.controls import (
    apply_control,
    check_fits,
    control_named,
    control_of,
)
from regrad_runner.scripts.fingerprint import fingerprint
from regrad_runner.scripts.processes import refuse_processes_of_its_own, were_launched
from regrad_runner.scripts.watching import ForwardWatch, OptimizerWatch


@dataclass(eq=False)
class Waiting:
    """An optimizer that has no corrections yet.

    Attributes:
        optimizer: Weakly referenced: the script decides how long it lives.
        name: Of its class.
        called: Outermost modules that were called in training and hold some of its parameters.
    """

    optimizer: weakref.ref[Optimizer]
    name: str
    called: list[nn.Module] = field(default_factory=list)


@dataclass(frozen=True)
class Attached:
    """An optimizer that has its corrections.

    Attributes:
        optimizer: Name of its class.
        modules: Names of the classes of the modules that it was attached with.
        attachment: What `regrad.attach` returned.
    """

    optimizer: str
    modules: tuple[str, ...]
    attachment: Attachment


class AutomaticAttachment:
    """Attaches corrections to every optimizer of this process, as a context manager.

    An optimizer is attached together with the outermost module whose training forward comes first
    and holds its parameters, before that forward runs: so its very first step is corrected. If the
    parameters are spread over several modules that are called separately, it is attached to all of
    them, once the last of them is called. What the script attaches itself is left alone, and so are
    optimizers other than those requested.

    Args:
        corrections: Strings for `regrad.create`, in acting order. Created again for each optimizer.
        control: Name of a control whose change is made too.
        control_of: Corrections whose control's change is made too.
        classes: Names of optimizer classes; none stands for all.
        trace: Called with a line when an optimizer is found and attached, with the reason.

    Attributes:
        attached: In the order of attachment.
        refused: Why optimizers were not attached.
        left_out: Names of the classes of optimizers that were not requested.
        start: Tells the weights and the inputs of the first training forward, before any change;
            None before it.
    """

    def __init__(
        self,
        corrections: Sequence[str],
        *,
        control: str | None = None,
        control_of: Sequence[str] = (),
        classes: Sequence[str] = (),
        trace: Callable[[str], None] = lambda line: None,
    ) -> None:
        made = registry.create_all(corrections)
        self._corrects_loss = any("criterion" in correction.needs.stages for correction in made)
        self._corrections = tuple(corrections)
        self._control = control
        self._control_of = tuple(control_of)
        self._classes = {name.lower() for name in classes}
        self._trace = trace
        self._launched = were_launched()
        self._waiting: list[Waiting] = []
        self._optimizers = OptimizerWatch(self._on_new, self._before_step, self._after_step)
        self._forwards = ForwardWatch(self._on_forward)
        self.attached: list[Attached] = []
        self.refused: list[str] = []
        self.left_out: list[str] = []
        self.start: str | None = None

    def __enter__(self) -> AutomaticAttachment:
        self._optimizers.start()
        if self._corrects_loss:
            inside.install()
        return self

    def __exit__(self, *_: object) -> None:
        self._optimizers.stop()
        self._forwards.stop()
        if self._corrects_loss:
            inside.uninstall()

    @property
    def waiting(self) -> list[str]:
        """Why optimizers have no corrections, a line each."""
        lines = []
        for waiting in self._waiting:
            if waiting.called:
                names = ", ".join(type(module).__name__ for module in waiting.called)
                lines.append(
                    f"{waiting.name}: some of its parameters are in no module that was called "
                    f"in training mode (called: {names})"
                )
            else:
                lines.append(
                    f"{waiting.name}: no module that holds its parameters was called "
                    "in training mode"
                )
        return lines

    def detach(self) -> None:
        """Detach every attachment, the last one first."""
        for attached in reversed(self.attached):
            attached.attachment.detach()

    def _on_new(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if self._classes and name.lower() not in self._classes:
            self._trace(f"{name} was created; left alone, since other classes were requested")
            self.left_out.append(name)
            return
        self._trace(
            f"{name} was created; it waits for a training forward of the module that holds its "
            "parameters"
        )
        self._waiting.append(Waiting(weakref.ref(optimizer), name))
        self._forwards.start()

    def _on_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        held = set(module.parameters())
        if self.start is None and held:
            self.start = fingerprint(module, inputs)
        for waiting in list(self._waiting):
            optimizer = waiting.optimizer()
            if optimizer is None or optimizer in ATTACHED:
                self._settle(waiting)
                continue
            trained = _trained(optimizer)
            if not trained.isdisjoint(held):
                if module not in waiting.called:
                    waiting.called.append(module)
                if trained <= _parameters_of(waiting.called):
                    self._attach(optimizer, waiting, _fewest(waiting.called, trained), module)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Correct the first step even if its closure makes the first forward pass."""
        if not self._waits(optimizer):
            return None
        engines: list[Engine] = []

        def correct() -> None:
            if engines:
                engines[0].correct()
                return
            engine = self._engine_of(optimizer)
            if engine is not None:
                engines.append(engine)
                engine.before_step(optimizer, (optimizer,), {})

        return wrap_closure(args, kwargs, correct)

    def _waits(self, optimizer: Optimizer) -> bool:
        return any(waiting.optimizer() is optimizer for waiting in self._waiting)

    def _engine_of(self, optimizer: Optimizer) -> Engine | None:
        for attached in self.attached:
            if attached.attachment.optimizer is optimizer:
                return attached.attachment.engine
        return None

    def _after_step(self, optimizer: Optimizer) -> None:
        """Attach after a step what holds some of the parameters, if nothing holds them all."""
        for waiting in list(self._waiting):
            if waiting.optimizer() is not optimizer:
                continue
            if optimizer in ATTACHED:
                self._settle(waiting)
            elif waiting.called:
                self._attach(optimizer, waiting, waiting.called, None)

    def _attach(
        self,
        optimizer: Optimizer,
        waiting: Waiting,
        modules: list[nn.Module],
        under_way: nn.Module | None,
    ) -> None:
        self._settle(waiting)
        model: Any = modules[0] if len(modules) == 1 else modules
        names = tuple(type(innermost_module(module)).__name__ for module in modules)
        try:
            refuse_processes_of_its_own(launched=self._launched)
            attachment = self._attachment(model, optimizer, modules)
        except (RegradError, ValueError, TypeError) as problem:
            reason = " ".join(str(problem).split())
            self.refused.append(f"{waiting.name}: {reason}")
            self._trace(f"{waiting.name} is left unchanged: {reason}")
            warnings.warn(
                f"{waiting.name} of {' and '.join(names)} trains uncorrected: {reason}",
                RegradWarning,
                stacklevel=2,
            )
            return
        when = "after its first step"
        if under_way is not None:
            # Torch took the list of this call's hooks before there was one of ours.
            attachment.engine.before_forward(under_way)
            when = f"before a forward of {type(innermost_module(under_way)).__name__}"
        self.attached.append(Attached(waiting.name, names, attachment))
        self._trace(f"{waiting.name} is attached with {' and '.join(names)}, {when}")

    def _attachment(
        self, model: Any, optimizer: Optimizer, modules: Sequence[nn.Module]
    ) -> Attachment:
        """Make the control's change and attach; correct the cross entropy if a correction does."""
        names = [*self._corrections]
        undo = ExitStack()
        control = self._control_on(optimizer)
        if control is not None:
            names += control.corrections
            check_fits(control, registry.create_all(names))
            whole = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
            undo = apply_control(control, whole, optimizer)
        with undo:
            attachment = _attachment_of(model, optimizer, names)
            undo.pop_all()  # attached: the change stays
        return attachment

    def _control_on(self, optimizer: Optimizer) -> Control | None:
        """Return the control whose change is to be made on an optimizer."""
        if self._control is not None:
            return control_named(self._control, optimizer)
        if self._control_of:
            return control_of(self._control_of, optimizer)
        return None

    def _settle(self, waiting: Waiting) -> None:
        """Take an optimizer off the list; with the last one, forwards are left alone."""
        self._waiting.remove(waiting)
        if not self._waiting:
            self._forwards.stop()


def _attachment_of(model: Any, optimizer: Optimizer, names: Sequence[str]) -> Attachment:
    """Attach new corrections; correct the cross entropy if one of them does."""
    corrections = registry.create_all(names)
    if not any("criterion" in correction.needs.stages for correction in corrections):
        return regrad.attach(model, optimizer, corrections)
    attachment = regrad.attach(model, optimizer, corrections, F.cross_entropy)
    CrossEntropyInside(attachment, in_the_loop=True)  # the attachment keeps it until detach
    return attachment


def _trained(optimizer: Optimizer) -> set[Tensor]:
    """Return the parameters of an optimizer that are trained."""
    return {parameter for parameter in parameters_of(optimizer) if parameter.requires_grad}


def _parameters_of(modules: Sequence[nn.Module]) -> set[Tensor]:
    found: set[Tensor] = set()
    for module in modules:
        found |= set(module.parameters())
    return found


def _fewest(modules: Sequence[nn.Module], trained: set[Tensor]) -> list[nn.Module]:
    """Return the one module that holds all that is trained, or else all of them."""
    for module in modules:
        if trained <= set(module.parameters()):
            return [module]
    return list(modules)
