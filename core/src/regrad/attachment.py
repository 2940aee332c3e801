"""Bind corrections to one model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad import refusals
from regrad.correction import Correction
from regrad.criterion import SwitchingCriterion
from regrad.engine import Engine
from regrad.errors import RegradError
from regrad.explain import Explanation, explain
from regrad.hooks import Hook, innermost_module, innermost_optimizer, was_compiled_and_called
from regrad.order import resolve_order
from regrad.receipt import differences, make_receipt
from regrad.record import ForwardRecord
from regrad.registry import as_tuple, create


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    corrections: Sequence[str | Correction],
    criterion: Callable[..., Tensor] | None = None,
) -> Attachment:
    """Bind corrections to a model and its optimizer; the training loop stays as it is.

    Args:
        model: The module that the loop calls: plain, compiled, or prepared for DDP
            or FSDP2. Gets hooks, which `Attachment.detach` removes.
        optimizer: Its optimizer, or a wrapper that keeps it as `.optimizer`.
        corrections: Names with options for `regrad.create`, or `Correction`
            objects, in the order in which they shall act. May be empty.
        criterion: The loss function, where a correction corrects it: then call
            `Attachment.criterion` in the loop.

    Returns:
        The attachment; as a context manager it detaches at the end.

    Raises:
        ValueError: If no correction of a name is installed or an option is out of range.
        TypeError: If an argument or option is of the wrong type.
        RegradError: If a correction cannot be right here; the message says why.
            Nothing was changed then.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with regrad.attach(model, optimizer, []) as attachment:
        ...     model(torch.ones(3, 2)).sum().backward()
        ...     _ = optimizer.step()
        ...     print(attachment)
        regrad attachment: no corrections
    """
    if isinstance(corrections, str):
        raise TypeError(f"corrections must be a list, got {corrections!r}; write [{corrections!r}]")
    made = [c for item in corrections for c in (as_tuple(create(item)) if isinstance(item, str) else (item,))]
    for correction in made:
        if not isinstance(correction, Correction):
            raise TypeError(f"corrections must be names or Correction objects, got {correction!r}")
        correction.check_class()
    ordered, reasons = resolve_order(made)
    inner = innermost_optimizer(optimizer)
    refusals.check(model, inner, optimizer, ordered, criterion)
    refusals.agree_across_ranks(ordered)
    return Attachment(model, inner, ordered, criterion, reasons)


class Attachment:
    """Corrections bound to one model and one optimizer. Made by `regrad.attach`.

    Attributes:
        model: The innermost module.
        optimizer: The innermost torch optimizer.
        corrections: In acting order.
        reasons: Why any correction was moved from the place it was given.
        record: The record of the first training forward, where a correction needs
            it and the model is not compiled; else None.
        registry: The pluggy registry: register observers (`hookimpl(wrapper=True)`) here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        corrections: Sequence[Correction],
        criterion: Callable[..., Tensor] | None,
        reasons: Sequence[str],
    ) -> None:
        self.model, self.optimizer = innermost_module(model), optimizer
        self.corrections, self.reasons = tuple(corrections), tuple(reasons)
        self._outer, self._criterion, self._handles = model, criterion, list[Any]()
        self._engine = Engine(self.model, optimizer, self.corrections)
        self.registry = self._engine.registry
        self.record: ForwardRecord | None = None
        self.is_detached = False
        try:
            self._set_up()
        except BaseException:
            self.detach()
            raise
        self._register()

    def _set_up(self) -> None:
        """Let every correction build its state; random numbers drawn for it are an error."""
        for correction in self.corrections:
            correction.attachment = self
        if any(c.needs.record for c in self.corrections) and not hasattr(self._outer, "_orig_mod"):
            self.record = ForwardRecord(self.model)
            self._handles += self.record.handles
        random_state = torch.get_rng_state()
        for correction, call in self._engine.callers["setup"]:
            call(attachment=self)
            if not torch.equal(torch.get_rng_state(), random_state):
                torch.set_rng_state(random_state)
                raise RegradError(f"{correction.name!r} must not draw global random numbers in setup")
        for _, call in self._engine.callers["wrap_criterion"]:
            corrected = call(criterion=self._criterion)
            self._criterion = SwitchingCriterion(self._engine, self._criterion, corrected)

    def _register(self) -> None:
        """Put the hooks on model and optimizer."""
        engine, model, optimizer = self._engine, self.model, self.optimizer
        for module in dict.fromkeys((model, self._outer)):
            hook = Hook(module, engine.before_forward)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        if engine.callers["predict_weights"]:
            self._handles.append(model.register_forward_hook(Hook(model, engine.after_forward)))
        self._handles += [
            model.register_state_dict_post_hook(Hook(model, engine.on_state_dict)),
            model.register_load_state_dict_pre_hook(Hook(model, engine.close_window)),
            optimizer.register_load_state_dict_pre_hook(engine.close_window),
            optimizer.register_step_pre_hook(engine.before_step),
            optimizer.register_step_post_hook(engine.after_step),
        ]
        refusals.ATTACHED.add(optimizer)

    def hook_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, inputs, output)` after each forward of a submodule, until detach.

        Raises:
            RegradError: If the model was compiled and called already: the hook would never fire.
        """
        if was_compiled_and_called(self._outer):
            raise RegradError("submodule hooks must be set before the first compiled call; attach earlier")
        self._handles.append(module.register_forward_hook(Hook(module, function)))

    @property
    def criterion(self) -> Callable[..., Tensor]:
        """The criterion to call in the loop: corrected in training mode, the original otherwise."""
        if self._criterion is None:
            raise RegradError("attachment has no criterion; pass attach(…, criterion=criterion)")
        return self._criterion

    def detach(self) -> None:
        """Restore the weights and remove every hook; the criterion is the original from here on."""
        self._engine.close_window()
        for handle in self._handles:
            handle.remove()
        for correction in self.corrections:
            correction.attachment = None
        if isinstance(self._criterion, SwitchingCriterion):
            self._criterion.corrected = None
        refusals.ATTACHED.discard(self.optimizer)
        self.is_detached = True

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def metrics(self) -> dict[str, float]:
        """Return counts, effects ("<correction>/<stage>/<measure>") and each correction's own metrics."""
        values = {"steps_applied": float(self._engine.applied), "steps_skipped": float(self._engine.skipped)}
        for name, stages in self._engine.meter.effects().items():
            values |= {f"{name}/{stage}/{key}": v for stage, seen in stages.items() for key, v in seen.items()}
        return values | {f"{c.name}/{key}": float(v) for c in self.corrections for key, v in c.metrics().items()}

    def receipt(self) -> dict[str, Any]:
        """Return what really happened, as plain values that JSON can hold."""
        return make_receipt(self._engine, self.reasons)

    def explain(self, batch: Any) -> Explanation:
        """Say what each correction would change on one batch; nothing is changed afterwards.

        Args:
            batch: (inputs, target) for a model with a criterion, or a mapping of
                keyword arguments for a model that returns its `loss`.
        """
        if self.is_detached:
            raise RegradError("attachment is detached; call attach() again before explaining")
        return explain(self._outer, self._engine, self._criterion, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state by name, with the receipt. Plain values and tensors only."""
        states = {c.name: c.state_dict() for c in self.corrections}
        return {"corrections": states, "receipt": self.receipt()}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: Of an attachment with the same corrections and options.
            strict: Refuse a state of other corrections or options; False loads
                what goes by the same name.

        Raises:
            RegradError: If `strict` and anything differs; says what.
        """
        found = differences(state["receipt"], self.receipt())
        if strict and found:
            raise RegradError(
                f"state must come from the same corrections; {'; '.join(found)}; strict=False loads the rest"
            )
        self._engine.close_window()
        self._engine.applied = int(state["receipt"]["steps_applied"])
        self._engine.skipped = int(state["receipt"]["steps_skipped"])
        for correction in self.corrections:
            if correction.name in state["corrections"]:
                correction.load_state_dict(state["corrections"][correction.name])

    def __str__(self) -> str:
        chain = " → ".join(map(repr, self.corrections)) or "no corrections"
        return "\n  ".join((f"regrad attachment: {chain}", *self.reasons))
