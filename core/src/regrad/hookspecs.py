"""The moments of a training step at which a correction may act, and what it is given there.

In time order of one optimizer step::

    setup                    once, at attach
    wrap_criterion           once, at attach
    for every optimizer step:
        predict_weights      before the first training-mode forward
        forward, backward    the user's, once per micro-batch
        correct_gradients    gradients final, weights restored
        correct_moments      right after, just before the update
        optimizer update     the user's
        correct_update       right after, what it did may be changed
        after_step           the update happened
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from regrad.errors import RegradError

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

    from regrad.correction import Correction
    from regrad.module_hooks import Handle
    from regrad.reading import Reading
    from regrad.record import ForwardRecord

hookspec = pluggy.HookspecMarker("regrad")
hookimpl = pluggy.HookimplMarker("regrad")


@dataclass(frozen=True, kw_only=True)
class LastStep:
    r"""Extrapolate what the last optimizer step did to a parameter.

    With θ' before that step and θ after it, the weights move to
    :math:`\theta + r(\theta - (1-\delta)\theta')`. The core keeps θ' in the buffer that holds the
    true weights while they are moved, so that this costs no memory beyond a displacement's. It does
    not move a parameter whose last step is unknown: before the first step, when there was no step
    because there was no gradient, and when somebody else has written the weights since.
    `predict_weights` must return it from the first step on, or θ' is not kept.

    Attributes:
        factor: r, in units of the last step; a number, or a scalar tensor, which is never read from
            its device. The number 0 moves nothing.
        decay: :math:`\delta`, the decoupled decay that the step contains and that must not be
            repeated: learning rate times decay rate.
        is_compiled: Whether to compile the pass over the memory of large tensors on a CPU, once in
            a process, by `torch.compile`; if that fails it continues without, after a warning.

    Example:
        >>> LastStep(factor=0.5)
        LastStep(factor=0.5, decay=0.0, is_compiled=False)
    """

    factor: float | Tensor
    decay: float | Tensor = 0.0
    is_compiled: bool = False


class Step:
    """One optimizer step, at the moment of the call.

    Attributes:
        optimizer: The innermost torch optimizer.
        index: Optimizer steps completed before this one.
        parameters: The optimizer's trainable parameters, in the order of its groups. Where an
            engine steps tensors of its own they are none of the model's: ask for their names.
        names: Their names in the model, in the same order.
        correction: The correction that is running.
        where_to: Takes what `predict_weights` returned, and returns where each of
            `parameters` would go, as a new tensor; None where it stays.
        layout: How the parameters lie; None for a step that no attachment made.
        displacements: In `correct_update`, what the optimizer's step added to each of
            `parameters`, without decoupled weight decay, in the parameter's shape and layout; None
            where it was not stepped or no correction of the stage selects it. Empty elsewhere.
        kept_gradients: Returns, given the step, what `gradients` shows after the update, when the
            optimizer may have cleared them; None before.
    """

    correction: Correction
    where_to: Callable[[Sequence[Tensor | LastStep | None]], list[Tensor | None]]
    layout: Layout | None = None
    displacements: Sequence[Tensor | None] = ()
    kept_gradients: Callable[[Step], list[Tensor | None]] | None = None

    def __init__(self, optimizer: optim.Optimizer, index: int) -> None:
        self.optimizer = optimizer
        self.index = index
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._groups[parameter] = group
        self.parameters = list(self._groups)
        self.names: list[str] = []

    @property
    def gradients(self) -> list[Tensor | None]:
        """`.grad` of each of `parameters`; None if there is none.

        In `correct_update` they are those that the update used.

        Raises:
            RegradError: There, at the first step, if the optimizer has written into them.
        """
        if self.kept_gradients is not None:
            return self.kept_gradients(self)
        return [parameter.grad for parameter in self.parameters]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over `parameters` with their names, including those without a gradient.

        Example:
            >>> import torch
            >>> step = Step(torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1), 0)
            >>> step.names = ["weight", "bias"]
            >>> [(name, parameter.numel()) for name, parameter in step.named_parameters()]
            [('weight', 2), ('bias', 1)]
        """
        return zip(self.names, self.parameters, strict=True)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the gradients that exist, with the names of their parameters.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> step = Step(torch.optim.SGD(model.parameters(), lr=0.1), 0)
            >>> step.names = ["weight", "bias"]
            >>> model.bias.grad = torch.ones(1)
            >>> list(step.named_gradients())
            [('bias', tensor([1.]))]
        """
        for name, gradient in zip(self.names, self.gradients, strict=True):
            if gradient is not None:
                yield name, gradient

    def named_displacements(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the displacements that exist, with the names of their parameters.

        Example:
            >>> import torch
            >>> step = Step(torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1), 0)
            >>> step.names = ["weight", "bias"]
            >>> step.displacements = [None, torch.ones(1)]
            >>> list(step.named_displacements())
            [('bias', tensor([1.]))]
        """
        for name, displacement in zip(self.names, self.displacements, strict=True):
            if displacement is not None:
                yield name, displacement

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's parameter group of `parameter`."""
        return self._groups[parameter]

    def lr_of(self, parameter: nn.Parameter) -> float | Tensor:
        """Return the learning rate that the next update of `parameter` will use.

        Raises:
            RegradError: If its group has none, as `learning_rate` says.
        """
        return learning_rate(self.optimizer, self._groups[parameter])


def learning_rate(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """Return the learning rate of one of an optimizer's parameter groups.

    A correction that reads rates calls this in `setup`, so that an error comes before training
    begins.

    Args:
        optimizer: The innermost torch optimizer.
        group: One of its `param_groups`.

    Returns:
        A number, or a tensor of one element if the optimizer keeps it as one.

    Raises:
        RegradError: If the group has no rate, or one that is not a number, because the optimizer
            computes its steps from something else.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> learning_rate(optimizer, optimizer.param_groups[0])
        0.1
    """
    rate: Any = group.get("lr")
    is_tensor = hasattr(rate, "numel") and rate.numel() == 1
    is_number = isinstance(rate, numbers.Real) and rate is not True and rate is not False
    if is_tensor or is_number:
        return rate  # type: ignore[no-any-return]
    kind = type(optimizer).__name__
    raise RegradError(
        f"lr must be a number in every parameter group of {kind}, got {rate!r}; "
        "give it one when you make the optimizer, and turn off rates that it computes itself, such "
        "as relative_step"
    )


class AttachmentInSetup(Protocol):
    """What `setup` is given: the `regrad.Attachment` that is being made.

    Attributes:
        model: The innermost module; for several, a `ModuleList` of them.
        optimizer: The innermost torch optimizer.
        corrections: In acting order.
        reasons: Sentences for the receipt. A correction that says what it chose, and why,
            replaces it with a longer tuple.
        record: The record of the first training forward, if a correction needs it and the model is
            not compiled; else None.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    corrections: tuple[Correction, ...]
    reasons: tuple[str, ...]
    record: ForwardRecord | None

    def hook_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, inputs, output)` after each forward of a module, until detach."""

    def hook_saved(
        self,
        module: nn.Module,
        pack: Callable[..., Any],
        unpack: Callable[[Any], Tensor],
        *,
        with_inputs: bool = False,
    ) -> None:
        """Pack what autograd saves in a module's training forwards, until detach."""


class OwnStep(Protocol):
    """What an engine that steps its own tensors shows in their place.

    Such an engine keeps what the optimizer steps in a form of its own, flat or cut, and calls an
    optimizer that is no torch optimizer. Its layout has tensors that stand for the model's
    parameters, and an optimizer that holds them.
    """

    @property
    def model(self) -> nn.Module:
        """The user's module inside the engine."""

    @property
    def optimizer(self) -> optim.Optimizer:
        """What corrections see as the optimizer.

        Its groups hold what stands for the parameters, under the names that these have in the
        model (`param_names`, as torch itself keeps them). The engine's step runs inside its `step`,
        so that hooks on it are called around it. Where it has `found_inf` set, the engine skips
        this step.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the receipt, such as how the engine clips."""

    def bind(self) -> Handle:
        """Lead the engine's step through `optimizer.step`.

        Called at attach, when nothing can be refused any more. The handle is removed at detach.
        """

    def shapes(self) -> AbstractContextManager[None]:
        """Let the parameters of `model` show their shapes in the block, where they are empty.

        Corrections read them in `setup`. The values need not be there.
        """


class Layout(Protocol):
    """Where parameters, gradients and optimizer state lie, and who answers for that.

    An engine that keeps them in a way of its own offers one, see `LayoutSpec`. Corrections see
    `.grad` of the optimizer's parameters, and its `state`; a layout makes that right before they
    act and writes back what they changed.

    Attributes:
        name: As refusals and the receipt call it.
        offers: What a correction may read here; each of the others is refused with `why_not`.
        is_cut: Whether a process holds only parts of parameters. Then the corrections' state
            differs from process to process, and models cannot be copied for `explain`.
        is_restored_to_save: Whether `model.state_dict()` reads the live weights in a way that
            `true_weights` cannot mend, so that moved weights are restored before it.
        model_group: The process group over which `sum_over_model` adds, or None where this
            process has the whole model.
        own_step: What stands for the parameters and the optimizer of an engine that steps tensors
            of its own; None where the optimizer steps the model's parameters.
    """

    name: str
    offers: frozenset[Reading]
    is_cut: bool
    is_restored_to_save: bool
    model_group: Any
    own_step: OwnStep | None

    def why_not(self, need: Reading) -> str:
        """Return why something that is not in `offers` cannot be read, and what to do instead."""

    def gradients(self, step: Step) -> None:
        """Make `.grad` of the step's parameters final: reduced, and laid out as its parameter.

        Called at every step before the corrections act. Collective where it must reduce.
        """

    def moments(self, optimizer: optim.Optimizer) -> None:
        """Lay the optimizer's state out as its parameters.

        Called before corrections predict weights, and after `gradients`.
        """

    def commit(self, step: Step) -> None:
        """Write back what corrections changed, where `gradients` handed out copies.

        Called once after every call of `gradients`, also where a correction raised.
        """

    def sum_over(self, values: Tensor, parameter: Tensor, kept: int | None = None) -> Tensor:
        """Add, in place, what each process computed from its own part of a parameter.

        Args:
            values: Any shape, the same on all processes. Overwritten.
            parameter: A parameter, its gradient or a tensor of its state.
            kept: Dimension whose parts have values of their own; None for none.

        Returns:
            `values` itself.
        """

    def sum_over_model(self, values: Tensor) -> Tensor:
        """Add, in place, what processes with different parts of the model computed.

        Args:
            values: Any shape, the same on all processes. Overwritten.

        Returns:
            `values` itself.
        """

    def move(self, open_window: Callable[[], bool]) -> bool:
        """Move the weights that the coming forward reads.

        Args:
            open_window: Copies and moves the parameters in place, and returns whether any was
                moved. Called here once; what the forward reads in their stead must follow.

        Returns:
            What `open_window` returned.
        """

    def restore(self, close_window: Callable[[], bool]) -> bool:
        """Undo `move` bit for bit; called too where nothing is moved.

        Args:
            close_window: Restores the parameters in place, and returns whether any was moved.

        Returns:
            What `close_window` returned.
        """

    def true_weights(self, read_window: Callable[[], dict[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        """Return copies of the true weights, by parameter that is moved now.

        Args:
            read_window: Returns those of the parameters themselves.
        """


class LayoutSpec:
    """The hook by which a distribution offers the layout of an engine.

    Its entry point in the group "regrad.layouts" names a module or an object with a function
    `regrad_layout` that is marked with `hookimpl`.
    """

    @hookspec(firstresult=True)
    def regrad_layout(self, model: nn.Module, optimizer: Any, model_group: Any) -> Layout | None:
        """Return the layout of this model and optimizer, or None if they are not of the engine.

        Called at attach, and once more before the first training forward or step, when
        everything that wraps them has done so. The first layout that is returned is taken; the
        core's own are asked last. May take fewer arguments.

        Args:
            model: As given to attach; of several, a `ModuleList` of them.
            optimizer: As given to attach.
            model_group: As given to attach: who holds the other parts of the model.
        """


class CorrectionSpec:
    """The hooks of a correction, which implements those of its stages.

    Each may take fewer arguments than are listed here.
    """

    def setup(self, attachment: AttachmentInSetup) -> None:
        """Build state, or refuse by raising.

        Called once, at attach, after every argument was validated and before any
        hook is on the model. Submodule hooks go through `attachment.hook_forward` and
        `attachment.hook_saved`, so that detach removes them. The state of the global random
        generators is restored afterwards: use your own generator.
        """

    def wrap_criterion(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
        """Return the criterion to use while the model is in training mode.

        Called at attach on the one correction that owns `criterion`. The
        attachment goes back to the original in evaluation mode and after detach.

        Where the original does not take what the model returns, as one of a single tensor where
        there are several exits, what is returned here may have two methods that are called with
        the same arguments: `in_evaluation`, in evaluation mode instead of the original, and
        `uncorrected`, whose gradients the effect meter compares with.
        """

    def predict_weights(self, step: Step) -> Sequence[Tensor | LastStep | None] | None:
        """Return how far to move each parameter before the forward pass.

        Called before the first training-mode forward after an optimizer step.
        Per entry of `step.parameters` one displacement, of the parameter's (local)
        shape, or a `LastStep` to extrapolate the last step, or None; None for the whole step moves
        nothing. The core copies the weights, moves them and restores them bit for bit. May be
        called again for the same step after an evaluation closed the window, and must then return
        the same numbers.
        """

    def correct_gradients(self, step: Step) -> None:
        """Change `.grad` in place.

        Called when the gradient is final: accumulated, all-reduced, unscaled;
        the weights are restored. Not called for a step that a scaler skips.
        """

    def correct_moments(self, step: Step) -> None:
        """Add to optimizer state that the next update will read.

        Called after every `correct_gradients`, just before the update.
        """

    def correct_update(self, step: Step) -> None:
        r"""Change `step.displacements` in place.

        Called right after the optimizer's update, not for a step that a scaler skips. With rate
        :math:`\eta` and decoupled weight decay :math:`\lambda` a displacement is
        :math:`\Delta = \theta' - (1-\eta\lambda)\theta`. While the hook runs, the parameters hold θ
        again; afterwards the core gives them :math:`(1-\eta\lambda)\theta + \Delta`. θ lies in the
        window's buffer. `step.gradients` are those that the update used.
        """

    def after_step(self, step: Step) -> None:
        """Learn from the step and update the correction's own state.

        Called after the update actually happened; gradients may be gone.
        """


HOOKS = tuple(name for name in vars(CorrectionSpec) if not name.startswith("_"))
for _hook in HOOKS:
    # A caller reaches only one correction, so its result is the result.
    hookspec(vars(CorrectionSpec)[_hook], firstresult=True)
