"""Bind corrections to one model and its optimizer."""

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad import explain, hooks, order, refusals, registry
from regrad.correction import Correction
from regrad.distributions import version
from regrad.engine import Engine, SwitchingCriterion
from regrad.errors import refuse_if

Criterion = Callable[..., Tensor]
CLIPPED = "gradients are read as the loop leaves them at step(): clipping in the loop comes first"


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    corrections: Sequence[str | Correction],
    criterion: Criterion | None = None,
) -> "Attachment":
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
    made = registry.create_all(corrections)
    inner = hooks.innermost_optimizer(optimizer)
    refusals.check(model, inner, optimizer, made, criterion)
    refusals.agree_across_ranks(made, inner.param_groups[0]["params"][0].device)
    return Attachment(model, inner, made, criterion)


class Attachment(contextlib.AbstractContextManager["Attachment"]):
    """Corrections bound to one model and one optimizer. Made by `regrad.attach`.

    Attributes:
        model: The innermost module.
        optimizer: The innermost torch optimizer.
        corrections: In acting order.
        reasons: Why any correction was moved from the place it was given, and what
            corrections note of their choices.
        record: The record of the first training forward, where a correction needs
            it and the model is not compiled; else None.
        engine: Runs the corrections. Register observers (`hookimpl(wrapper=True)`)
            with `engine.registry.register`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, given: Sequence[Correction], criterion: Any
    ) -> None:
        self.model, self.optimizer, self._outer = hooks.innermost_module(model), optimizer, model
        self.corrections, self.reasons = order.resolve_order(given)
        self._original = self._criterion = criterion
        self._handles: list[Any] = []
        self.engine = Engine(self.model, optimizer, self.corrections)
        self.record: hooks.ForwardRecord | None = None
        self.is_detached = False
        try:
            self._set_up()
        except BaseException:
            self.detach()
            raise
        self._register()

    def _set_up(self) -> None:
        """Let every correction build its state; what it draws leaves the global random numbers as they were."""
        for correction in self.corrections:
            correction.attachment = self
        compiled = hasattr(self._outer, "_orig_mod") or self.model._compiled_call_impl is not None
        if any(c.needs.record for c in self.corrections) and not compiled:
            self.record = hooks.ForwardRecord(self.model)
            self._handles += self.record.handles
        for _, call in self.engine.callers["setup"]:
            with torch.random.fork_rng(devices=[]):
                call(attachment=self)
        for owner, call in self.engine.callers["wrap_criterion"]:
            self._criterion = SwitchingCriterion(
                self.engine, owner, self._original, call(criterion=self._original)
            )

    def _register(self) -> None:
        """Put the hooks on model and optimizer."""
        engine, model, optimizer = self.engine, self.model, self.optimizer
        for module in {model: 0, self._outer: 0}:
            hook = hooks.Hook(module, engine.before_forward)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        self._handles += [
            model.register_forward_hook(hooks.Hook(model, engine.after_forward)),
            model.register_state_dict_post_hook(hooks.Hook(model, engine.on_state_dict)),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(hooks.Hook(model, engine.close_window)),  # type: ignore[no-untyped-call]
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
        traced = hooks.was_compiled_and_called(self._outer)
        refuse_if(
            traced, "submodule hooks must be set before the first compiled call; attach earlier"
        )
        self._handles.append(module.register_forward_hook(hooks.Hook(module, function)))

    @property
    def criterion(self) -> Criterion:
        """The criterion to call in the loop, corrected in training mode, the original otherwise."""
        refuse_if(
            self._criterion is None,
            "attachment has no criterion; pass attach(…, criterion=criterion)",
        )
        return self._criterion  # type: ignore[no-any-return]

    def detach(self) -> None:
        """Restore the weights and remove every hook; the criterion is the original from here on."""
        if self.is_detached:
            return
        self.engine.close_window()
        for handle in self._handles:
            handle.remove()
        for correction in self.corrections:
            correction.attachment = None
        if self._criterion is not self._original:
            self._criterion.corrected = None
        refusals.ATTACHED.discard(self.optimizer)
        self.is_detached = True

    def __exit__(self, *_: object) -> None:
        self.detach()

    def metrics(self) -> dict[str, float]:
        """Return counts, effects ("<correction>/<stage>/<measure>") and each correction's own metrics."""
        values = {
            "steps_applied": float(self.engine.applied),
            "steps_skipped": float(self.engine.skipped),
        }
        for name, stages in self.engine.meter.effects().items():
            values |= {
                f"{name}/{stage}/{key}": v
                for stage, seen in stages.items()
                for key, v in seen.items()
            }
        return values | {
            f"{c.name}/{key}": float(v) for c in self.corrections for key, v in c.metrics().items()
        }

    def receipt(self) -> dict[str, Any]:
        """Return what really happened, as plain values that JSON can hold.

        Returns:
            "corrections" (name, distribution, version, options, stages, matched
            parameters), "order", "notes", "parameters", "steps_applied",
            "steps_skipped", "effects", "seed" and "environment".
        """
        step, engine, rows = self.engine.step(), self.engine, []
        for c in self.corrections:
            on_weights = {"gradient", "moment", "weights"} & set(c.needs.stages)
            matched = [
                n
                for n, p in zip(step.names, step.parameters, strict=True)
                if on_weights and c.selects(n, p)
            ]
            options = json.loads(json.dumps(vars(c.options), default=str))
            row = {"name": c.name, **registry.origin(c), "options": options}
            rows.append(row | {"stages": list(c.needs.stages), "matched": matched})
        counts = {
            "parameters": len(step.names),
            "steps_applied": engine.applied,
            "steps_skipped": engine.skipped,
        }
        machine = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "regrad": version("regrad"),
        }
        machine["device"] = ", ".join(sorted({str(p.device) for p in step.parameters}))
        seen = {
            "effects": engine.meter.effects(),
            "seed": torch.initial_seed(),
            "environment": machine,
        }
        reads = engine.callers["correct_gradients"] or engine.callers["correct_moments"]
        told = {
            "order": [c.name for c in self.corrections],
            "notes": [*self.reasons, *([CLIPPED] if reads else [])],
        }
        return {"corrections": rows, **told, **counts, **seen}

    def explain(self, batch: Any) -> explain.Explanation:
        """Say what each correction would change on one batch, tried on copies; nothing is changed afterwards.

        Args:
            batch: (inputs, target) for a model with a criterion, or a mapping of
                keyword arguments for a model that returns its `loss`.

        Raises:
            TypeError: If the batch is neither.
            RegradError: Under FSDP2, whose modules cannot be copied.
        """
        self.engine.close_window()
        return explain.explain(self, self._original, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state by name, with effects and receipt. Plain values and tensors only."""
        states = {c.name: c.state_dict() for c in self.corrections}
        return {
            "corrections": states,
            "effects": dict(self.engine.meter.sums),
            "receipt": self.receipt(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: Of an attachment with the same corrections and options.
            strict: Refuse a state of other corrections or options; False loads
                what goes by the same name.

        Raises:
            RegradError: If `strict` and anything differs; says what.
        """
        found = "; ".join(_differences(state["receipt"], self.receipt()))
        refuse_if(
            strict and found,
            f"state must come from the same corrections; {found}; or pass strict=False",
        )
        self.engine.close_window()
        self.engine.applied, self.engine.skipped = (
            int(state["receipt"][f"steps_{k}"]) for k in ("applied", "skipped")
        )
        for correction in self.corrections:
            if correction.name in state["corrections"]:
                correction.load_state_dict(state["corrections"][correction.name])
                self.engine.meter.sums |= {
                    k: s for k, s in state["effects"].items() if k[0] == correction.name
                }

    def __str__(self) -> str:
        chain = " → ".join(map(repr, self.corrections)) or "no corrections"
        return "\n  ".join((f"regrad attachment: {chain}", *self.reasons))


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per correction that is missing, added, or has other options."""
    old, new = (
        {c["name"]: c["options"] for c in receipt["corrections"]} for receipt in (theirs, ours)
    )
    lines = [
        f"{name!r} is {'missing' if name in old else 'new'} here"
        for name in sorted(old.keys() ^ new.keys())
    ]
    pairs = [(name, key) for name in old if name in new for key in {**old[name], **new[name]}]
    changed = [(name, key) for name, key in pairs if old[name].get(key) != new[name].get(key)]
    return lines + [
        f"{n}.{key} was {old[n].get(key)!r}, is {new[n].get(key)!r}" for n, key in changed
    ]
