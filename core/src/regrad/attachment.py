"""Bind corrections to one model and its optimizer."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from regrad import (
    explain,
    layouts,
    module_hooks,
    order,
    other_optimizers,
    ranks,
    receipt,
    refusals,
    registry,
    updates,
)
from regrad.correction import Correction
from regrad.criterion import Switch, switching_criterion
from regrad.devices import random_numbers_kept
from regrad.engine import Engine
from regrad.errors import RegradError
from regrad.hookspecs import Layout
from regrad.inside import CrossEntropyInside
from regrad.optimizer_state import StateInOptimizer, form_problem
from regrad.optimizers import parameters_of
from regrad.record import ForwardRecord
from regrad.saved_tensors import Pack, SavedTensors, Unpack
from regrad.wrappers import (
    holder_of_all,
    innermost_module,
    is_compiled,
    optimizer_layers,
    was_compiled_and_called,
)

Criterion = Callable[..., Tensor]


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer,
    corrections: Sequence[str | Correction],
    criterion: Criterion | Literal["inside"] | None = None,
    *,
    model_group: Any = None,
) -> "Attachment":
    """Bind corrections to a model and its optimizer; the training loop does not change.

    Args:
        model: The module that the loop calls: plain, compiled, or prepared for DDP
            or FSDP2. Gets hooks, which `Attachment.detach` removes. Pass several, such as encoder
            and decoder, as a list. If a module is not called itself, as with a LightningModule, the
            parts that are called are found after the first step.
        optimizer: Its optimizer, or a wrapper of it. Its `state_dict()` holds the
            corrections' state from here on, under the key "regrad".
        corrections: Names with options for `regrad.create`, or `Correction`
            objects, in the order in which they shall act. May be empty.
        criterion: The loss function, where a correction corrects it: then call
            `Attachment.criterion` in the loop. Or "inside", for a model that computes its
            loss itself, as those of transformers and nanoGPT do: every cross entropy of its
            training forward is the corrected one until detach, see
            `regrad.inside.CrossEntropyInside`; the loop stays as it is.
        model_group: Where the model is in parts (pipeline stages): the
            `torch.distributed` process group whose processes hold one part each, none of
            them twice. What corrections sum over the whole model, as the norm of
            `clip-norm`, is summed over it. Without it such corrections are refused there.

    Returns:
        The attachment; as a context manager it detaches at the end.

    Raises:
        ValueError: If no correction of that name is installed, an option is out of range, or
            the criterion is a word other than "inside".
        TypeError: If an argument or option is of the wrong type.
        RegradError: If a correction cannot work correctly here; the message says why. Nothing is
            changed in that case.

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
    layers = optimizer_layers(optimizer)
    given = [model] if isinstance(model, nn.Module) else _listed(model)
    refusals.check_arguments(given, criterion)
    whole: nn.Module = nn.ModuleList(given) if len(given) > 1 else given[0]
    layout = layouts.choose(whole, optimizer, model_group)
    settle_layout = functools.partial(_settle_layout, whole, optimizer, model_group)
    holder = holder_of_all(layers)
    own_step = layout.own_step
    if own_step is not None:
        model = whole = own_step.model
        layers = [*layers, own_step.optimizer]
    refusals.check(given, layers, made, criterion, is_served=not layouts.is_own(layout))
    refusals.check_layout(made, layout)
    inner = holder_of_all(layers)
    in_parts = model_group is not None
    proved = ranks.agree_across_ranks(whole, inner, made, model_group=model_group)
    acts_inside = isinstance(criterion, str)
    loss = F.cross_entropy if acts_inside else criterion
    attachment = Attachment(
        model,
        inner,
        made,
        loss,
        layers=layers,
        acts_inside=acts_inside,
        layout=layout,
        state_holder=holder,
    )
    attachment.engine.before_first_use = functools.partial(settle_layout, attachment)
    attachment.engine.before_first_step = functools.partial(
        ranks.check_first_step,
        whole,
        inner,
        attachment.corrections,
        proved=proved,
        in_parts=in_parts,
        stands_in=own_step is not None,
    )
    if any("micro" in correction.needs.reads for correction in made):
        wrappers = [
            m for m in whole.modules() if isinstance(m, nn.parallel.DistributedDataParallel)
        ]
        attachment.engine.before_every_step = functools.partial(
            refusals.check_together, made, wrappers
        )
    return attachment


def _settle_layout(
    model: nn.Module, optimizer: Any, model_group: Any, attachment: "Attachment"
) -> None:
    """Choose the layout again, now that what replaces or wraps parameters has done so.

    Raises:
        RegradError: If a correction is not exact on what it has become.
    """
    layout = layouts.choose(model, optimizer, model_group)
    refusals.check_layout(attachment.corrections, layout)
    attachment.engine.layout = layout


def _listed(models: Any) -> list[Any]:
    """Return several models as a list; anything else is refused by name later."""
    return list(models) if isinstance(models, list | tuple) else [models]


class Attachment(contextlib.AbstractContextManager["Attachment"]):
    """Corrections bound to one model and one optimizer. Made by `regrad.attach`.

    Attributes:
        model: The innermost module; for several, a `ModuleList` of them.
        optimizer: The innermost torch optimizer.
        corrections: In acting order.
        reasons: Why any correction was moved from its given place, and what corrections note about
            their choices.
        record: The record of the first training forward of every module, if a correction needs it
            and the model is not compiled; else None.
        engine: Runs the corrections. Register observers (`hookimpl(wrapper=True)`)
            with `engine.registry.register`.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer,
        given: Sequence[Correction],
        criterion: Any,
        *,
        layers: Sequence[Any] = (),
        acts_inside: bool = False,
        layout: Layout | None = None,
        state_holder: Optimizer | None = None,
    ) -> None:
        self._called: list[nn.Module] = [model] if isinstance(model, nn.Module) else [*model]
        roots = [innermost_module(module) for module in self._called]
        self.model = roots[0] if isinstance(model, nn.Module) else nn.ModuleList(roots)
        self.optimizer = optimizer
        self.corrections, self.reasons = order.resolve_order(given)
        self._original = criterion
        self._criterion = criterion
        self._acts_inside = acts_inside
        self._switch: Switch | None = None
        self._handles: list[module_hooks.Handle] = []
        self._in_optimizer = StateInOptimizer(self)
        # An engine saves and loads the optimizer that it steps, not what stands for it.
        self._state_holder = optimizer if state_holder is None else state_holder
        self.engine = Engine(
            self.model, optimizer, self.corrections, roots=roots, layers=layers, layout=layout
        )
        self.record: ForwardRecord | None = None
        self.is_detached = False
        try:
            self._set_up()
            self._register()
        except BaseException:
            self.detach()
            raise

    def _set_up(self) -> None:
        """Let every correction build its state; restore the global random state afterwards."""
        for correction in self.corrections:
            correction.attachment = self
        reads_record = any(correction.needs.record for correction in self.corrections)
        roots = self.engine.roots
        modules = (*self._called, self.model)
        if reads_record and not any(is_compiled(module) for module in modules):
            self.record = ForwardRecord(self.model, roots)
            self._handles += self.record.handles
        with self._shapes():
            self._set_up_corrections()
        for owner, call in self.engine.callers["wrap_criterion"]:
            with self.engine.named(owner, "wrap_criterion"):
                corrected = call(criterion=self._original)
            self._switch = Switch(self.engine, owner, self._original, corrected)
            self._criterion = switching_criterion(self._switch)
        if self._acts_inside and self._switch is not None:
            CrossEntropyInside(self)

    def _shapes(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which the model's parameters show their shapes."""
        own_step = self.engine.layout.own_step
        return contextlib.nullcontext() if own_step is None else own_step.shapes()

    def _set_up_corrections(self) -> None:
        """Call the hook `setup` of every correction that has it."""
        parameters = parameters_of(self.optimizer)
        for correction, call in self.engine.callers["setup"]:
            with random_numbers_kept(parameters), self.engine.named(correction, "setup"):
                call(attachment=self)
        if self.engine.callers["correct_update"]:
            changing = self.engine.names_of("correct_update")
            updates.warn_of_unknown_decay(self.optimizer, changing)

    def _register(self) -> None:
        """Put the hooks on models and optimizer."""
        roots = self.engine.roots
        for module in dict.fromkeys((*roots, *self._called)):
            self._hook(
                module, module.register_forward_pre_hook, self.engine.before_forward, prepend=True
            )
        for root in roots:
            self._hook(root, root.register_forward_hook, self.engine.after_forward)
            self._hook(root, root.register_state_dict_post_hook, self.engine.on_state_dict)
            before_saving = module_hooks.first_before_state_dict(root)
            self._hook(root, before_saving, self.engine.before_state_dict)
            self._hook(root, root.register_load_state_dict_pre_hook, self.engine.close_window)
        optimizer = self.optimizer
        # One by one: if a later one raises, the earlier ones can be removed.
        for handle in self._in_optimizer.register(self._state_holder):
            self._handles.append(handle)
        self._handles.append(optimizer.register_step_pre_hook(self.engine.on_step_begin))
        self._handles.append(optimizer.register_step_post_hook(self.engine.on_step_end))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self.engine.callers["predict_weights"]:
            other_optimizers.add(self.engine)
        if not any(type(root).forward is not nn.Module.forward for root in roots):
            self.engine.parts.watch(roots, self.engine.step().parameters)
        self._in_optimizer.take_carried(self._state_holder)
        if self.engine.layout.own_step is not None:
            self._handles.append(self.engine.layout.own_step.bind())
        refusals.ATTACHED.add(optimizer)

    def _hook(
        self,
        module: nn.Module,
        register: Callable[..., module_hooks.Handle],
        function: Callable[..., Any],
        **options: Any,
    ) -> None:
        self._handles.append(module_hooks.add_hook(module, register, function, **options))

    def hook_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, inputs, output)` after each forward of a submodule, until detach.

        Raises:
            RegradError: If the model was compiled and called already: the hook would never fire.
        """
        if any(was_compiled_and_called(called) for called in self._called):
            raise RegradError(
                "submodule hooks must be set before the first compiled call; attach earlier"
            )
        self._hook(module, module.register_forward_hook, function)

    def hook_saved(
        self, module: nn.Module, pack: Pack, unpack: Unpack, *, with_inputs: bool = False
    ) -> None:
        """Pack what autograd saves in a module's training forwards, until detach.

        While the module runs in training mode with gradients, and with it the modules inside of
        it, `pack(tensor)` is called with every tensor that autograd saves, and `unpack(packed)` in
        backward with what it returned, as torch's `torch.autograd.graph.saved_tensors_hooks` call
        theirs. The hooks of a module inside another come before the other's.

        Args:
            module: A module of the model.
            pack: Returns anything. A tensor that is not to be packed may be returned as it is. Must
                not change the tensor.
            unpack: Returns a tensor of the same shape, dtype and device as the saved one. May be
                called several times, and after detach.
            with_inputs: Whether `pack(module, inputs, tensor)` is called instead, where `inputs` is
                what the module was called with: positional arguments, then those by keyword. Keep
                none of them for longer than the call.

        Raises:
            RegradError: If the model is compiled. Later, in the module's forward, where it runs in
                compiled code, inside other hooks on saved tensors, as in a non-reentrant
                activation checkpoint, or again in backward, as in a re-entrant one.
        """
        parts = itertools.chain.from_iterable(called.modules() for called in self._called)
        if any(is_compiled(part) for part in parts):
            raise RegradError(
                "saved tensors cannot be hooked in a compiled model, which saves others; "
                "attach to the model before compiling it, and leave it uncompiled"
            )
        names = {part: name for name, part in self.model.named_modules()}
        name = names.get(module, type(module).__name__)
        saved = SavedTensors(module, name, pack, unpack, with_inputs=with_inputs)
        self._handles.append(saved)
        saved.register()

    def remove_at_detach(self, handle: module_hooks.Handle) -> None:
        """Keep something whose `remove` is to be called at detach."""
        self._handles.append(handle)

    def _after_step(self, *_: Any) -> None:
        self._in_optimizer.warn_if_missing()

    @property
    def criterion(self) -> Criterion:
        """The criterion to call in the loop, corrected in training mode, the original otherwise.

        An `nn.Module` if the original is one, so that a model can hold it as a submodule.
        """
        if self._criterion is None:
            raise RegradError("attachment has no criterion; pass attach(…, criterion=criterion)")
        return self._criterion  # type: ignore[no-any-return]

    def detach(self) -> None:
        """Restore the weights and remove every hook; from then on the criterion is the original."""
        if self.is_detached:
            return
        self.engine.close_window()
        self.engine.parts.remove()
        other_optimizers.discard(self.engine)
        for handle in self._handles:
            handle.remove()
        for correction in self.corrections:
            correction.attachment = None
        if self._switch is not None:
            self._switch.corrected = None
        refusals.ATTACHED.discard(self.optimizer)
        self.is_detached = True

    def __exit__(self, *_: object) -> None:
        self.detach()

    def metrics(self) -> dict[str, float]:
        """Return counts, effects and each correction's own metrics, by name.

        Effects are named "<correction>/<stage>/<measure>", a correction's own metrics
        "<correction>/<name>".
        """
        values = {
            "steps_applied": float(self.engine.applied),
            "steps_skipped": float(self.engine.skipped),
        }
        for name, stages in self.engine.meter.effects().items():
            for stage, measures in stages.items():
                for measure, value in measures.items():
                    values[f"{name}/{stage}/{measure}"] = value
        for correction in self.corrections:
            for key, value in correction.metrics().items():
                values[f"{correction.name}/{key}"] = float(value)
        return values

    def receipt(self) -> dict[str, Any]:
        """Return what actually happened, as plain values that JSON can hold.

        Returns:
            "corrections" (name, distribution, version, options, stages, matched
            parameters), "order", "notes", "parameters", "steps_applied",
            "steps_skipped", "effects", "seed" and "environment".
        """
        return receipt.receipt(self.engine, tuple(self.reasons))

    def explain(self, batch: Any) -> explain.Explanation:
        """Say what each correction would change on one batch, tried on copies.

        Args:
            batch: (inputs, target) for a model with a criterion, or a mapping of
                keyword arguments for a model that returns its `loss`.

        Raises:
            TypeError: If the batch is neither.
            RegradError: Under FSDP2, whose modules cannot be copied.
        """
        self.engine.close_window()
        return explain.explain(
            self,
            batch,
            attach_copy=self._attach_copy,
            has_criterion=self._original is not None and not self._acts_inside,
        )

    def _attach_copy(
        self, model: nn.Module, optimizer: Optimizer, corrections: Sequence[Correction]
    ) -> "Attachment":
        """Attach new corrections to a copy of model and optimizer, with the same criterion."""
        return type(self)(
            model, optimizer, corrections, self._original, acts_inside=self._acts_inside
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state by name, with the window's, effects and receipt.

        Plain values and tensors only. The optimizer's own `state_dict()` holds it too, under
        the key "regrad".
        """
        return {
            "corrections": {
                correction.name: correction.state_dict() for correction in self.corrections
            },
            "effects": dict(self.engine.meter.sums),
            "window": self.engine.window_state(),
            "receipt": self.receipt(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: From an attachment with the same corrections and options.
            strict: Refuse a state of other corrections or options; False loads what has the same
                name.

        Raises:
            ValueError: If it is not what `state_dict` returned.
            RegradError: If `strict` and anything differs; says what.
        """
        problem = form_problem(state)
        if problem:
            raise ValueError(f"state must be what Attachment.state_dict() returned, got {problem}")
        found = "; ".join(receipt.differences(state["receipt"], self.receipt()))
        if strict and found:
            raise RegradError(
                f"state must come from the same corrections; {found}; or pass strict=False"
            )
        self.engine.close_window()
        self.engine.applied = int(state["receipt"]["steps_applied"])
        self.engine.skipped = int(state["receipt"]["steps_skipped"])
        for correction in self.corrections:
            if correction.name in state["corrections"]:
                self._load_correction(correction, state["corrections"][correction.name])
                self.engine.meter.load_sums(correction.name, state["effects"])
        self.engine.load_window_state(state.get("window", {}))
        self._in_optimizer.is_there()

    def _load_correction(self, correction: Correction, state: Any) -> None:
        """Load a correction's state; explain what is wrong if it does not fit."""
        try:
            with self.engine.named(correction, "load_state_dict"):
                correction.load_state_dict(state)
        except (LookupError, TypeError, AttributeError) as error:
            raise RegradError(
                f"state of correction {correction.name!r} must be what its state_dict() returned, "
                f"got another: {type(error).__name__}: {error}"
            ) from error

    def __str__(self) -> str:
        chain = " → ".join(map(repr, self.corrections)) or "no corrections"
        return "\n  ".join((f"regrad attachment: {chain}", *self.reasons))
