"""The corrected cross entropy inside a model that computes its own loss."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.nn import functional as F

from regrad.engine import Engine
from regrad.module_hooks import Handle

PLAIN_CROSS_ENTROPY = F.cross_entropy
PLAIN_NLL_LOSS = F.nll_loss
NORMALISED = 1e-2
"""How far from 0 the logarithm of summed probabilities may be.

bfloat16 rounds a probability to 4e-3.
"""
NONE_INSIDE = (
    "{name!r} corrects the cross entropy that the model computes, but a step ran without one: no "
    "training forward of the attached {model} called torch.nn.functional.cross_entropy, or "
    "nll_loss with log-probabilities (calls in compiled code are not seen). If the loop computes "
    "the loss, pass it as criterion=… to attach() and call attachment.criterion; if there is no "
    "cross entropy, leave {name!r} out"
)
NONE_IN_TRAINING = (
    "{name!r} corrects the cross entropy, but a step of {optimizer} ran without one while the "
    "attached {model} trains: nothing called torch.nn.functional.cross_entropy, or nll_loss with "
    "log-probabilities (calls in compiled code are not seen), so {name!r} changed nothing. With "
    "another loss leave it out; if a compiled model computes its loss, compile only what comes "
    "before the loss"
)


class Corrected(Protocol):
    """What this file needs from an attachment, see `regrad.Attachment`."""

    engine: Engine

    @property
    def criterion(self) -> Any:
        """The criterion, corrected in training mode."""

    def hook_forward(self, module: nn.Module, function: Any) -> None:
        """Call a function after each forward of a module, until detach."""

    def remove_at_detach(self, handle: Handle) -> None:
        """Keep what is to be removed at detach."""


class CrossEntropyInside:
    """Correct every cross entropy that a model computes in its own training forward.

    A call of `torch.nn.functional.cross_entropy` that comes from the attached model's
    forward, in training mode, is sent to the attachment's criterion.
    `nn.CrossEntropyLoss`, and the losses of transformers and nanoGPT look up the function by that
    name at every call. So target, reduction and whatever else the model adds to its loss stay the
    model's own, and nothing has to be known about them. `torch.nn.functional.nll_loss` of
    log-probabilities is the same loss and is corrected too. A part of the model that is called by
    itself counts as the model. Every other call uses the plain function; so do a compiled model and
    a part of a model that activation checkpointing runs again in backward: see `calls`. If the
    first step has no call to correct, a warning says so once.

    `regrad.attach(…, criterion="inside")` makes one by itself.

    Args:
        attachment: Made with `criterion=torch.nn.functional.cross_entropy`. Its
            `detach` ends this too.
        in_the_loop: Also correct calls outside the model's forward, such as the loop's own loss,
            while the model is in training mode and gradients are computed. With several such
            attachments, the one whose model was called last is used.

    Attributes:
        calls: Cross entropies that were corrected so far.
        in_the_loop: As given.
        last_forward: When its model was called last: a larger number is later.

    Example:
        >>> import regrad, torch
        >>> from torch import nn
        >>> class Classifier(nn.Linear):
        ...     def forward(self, inputs, labels):
        ...         return nn.functional.cross_entropy(super().forward(inputs), labels)
        >>> model = Classifier(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with regrad.attach(model, optimizer, [], nn.functional.cross_entropy) as attachment:
        ...     inside = CrossEntropyInside(attachment)
        ...     loss = model(torch.ones(1, 2), torch.tensor([0]))
        >>> inside.calls
        1
    """

    def __init__(self, attachment: Corrected, *, in_the_loop: bool = False) -> None:
        self.calls = 0
        self.in_the_loop = in_the_loop
        self.last_forward = 0
        self.roots = attachment.engine.roots
        self.criterion = attachment.criterion
        self._engine = attachment.engine
        self._engine.no_criterion = NONE_IN_TRAINING if in_the_loop else NONE_INSIDE
        self._takes_log_probabilities: bool | None = None
        if in_the_loop:
            for root in self.roots:
                attachment.hook_forward(root, self._after_forward)
        attachment.remove_at_detach(self)
        _LIVE.add(self)
        install()

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        if self in _LIVE:
            _LIVE.discard(self)
            uninstall()

    @property
    def is_training(self) -> bool:
        """Whether any of the models that the loop calls is in training mode."""
        return any(root.training for root in self.roots)

    def correct(self, *arguments: Any, **options: Any) -> Any:
        """Return the corrected loss.

        Of several attachments to one model, as with two optimizers, one corrects it for all.
        """
        self.calls += 1
        for inside in _LIVE:
            if inside.roots == self.roots:
                inside._engine.criterion_called = True
        return self.criterion(*arguments, **options)

    def parts(self) -> set[nn.Module]:
        """Return every module of the model."""
        found: set[nn.Module] = set()
        for root in self.roots:
            found.update(root.modules())
        return found

    def _after_forward(self, *_: Any) -> None:
        self.last_forward = next(_FORWARDS)

    def takes_log_probabilities(self, values: Tensor) -> bool:
        """Say whether the model passes log-probabilities to `nll_loss`, judging by its first call.

        Later calls are not checked: that would wait for the device at every step.
        """
        if self._takes_log_probabilities is None:
            total = torch.logsumexp(values.detach().float(), dim=min(1, values.dim() - 1))
            self._takes_log_probabilities = bool((total.abs() < NORMALISED).all())
        return self._takes_log_probabilities


_LIVE: weakref.WeakSet[CrossEntropyInside] = weakref.WeakSet()
_FORWARDS = itertools.count(1)
_installed: list[bool] = []


def install() -> None:
    """Replace torch's functions by stand-ins, until `uninstall` was called as often.

    They behave like torch's functions until a correction is attached. `F.cross_entropy(model(x),
    y)` looks the function up before it calls the model: to correct the very first loss of a loop
    whose model is attached in that call, install them before.
    """
    _installed.append(True)
    F.cross_entropy = _cross_entropy
    F.nll_loss = _nll_loss


def uninstall() -> None:
    """Undo one `install`; the last one puts torch's functions back."""
    _installed.pop()
    if not _installed:
        F.cross_entropy = PLAIN_CROSS_ENTROPY
        F.nll_loss = PLAIN_NLL_LOSS


def _cross_entropy(  # noqa: PLR0917 - the arguments of torch's function
    input: Tensor,  # noqa: A002 - the names in torch.nn.functional
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Stand in for `torch.nn.functional.cross_entropy`."""
    reduction = _reduction_named(reduction, size_average, reduce)
    caller = _caller()
    if caller is None:
        # Not PLAIN_CROSS_ENTROPY: a compiled graph would look it up by name and find this function.
        kind: Any = _reduction.get_enum(reduction)
        return torch._C._nn.cross_entropy_loss(
            input, target, weight, kind, ignore_index, label_smoothing
        )
    return caller.correct(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _nll_loss(  # noqa: PLR0917 - the arguments of torch's function
    input: Tensor,  # noqa: A002 - the names in torch.nn.functional
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """Stand in for `torch.nn.functional.nll_loss`."""
    reduction = _reduction_named(reduction, size_average, reduce)
    caller = _caller()
    if caller is None or not caller.takes_log_probabilities(input):
        kind: Any = _reduction.get_enum(reduction)
        return torch._C._nn.nll_loss_nd(input, target, weight, kind, ignore_index)
    return caller.correct(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=0.0,
    )


# They replace torch's functions, and are shown under their names.
_cross_entropy.__name__ = PLAIN_CROSS_ENTROPY.__name__
_nll_loss.__name__ = PLAIN_NLL_LOSS.__name__


def _reduction_named(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """Return the reduction that is meant, where one of torch's two older arguments is given."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


STAND_INS = (_cross_entropy.__code__, _nll_loss.__code__)


def _caller() -> CrossEntropyInside | None:
    """Return who corrects the call of a stand-in: the innermost attached model that made it.

    None for the criterion's own call of the function, and for a trace: a compiler would
    keep what it traced after detach.
    """
    if torch.compiler.is_compiling():
        return None
    live: dict[nn.Module, CrossEntropyInside] = {}
    for inside in _LIVE:
        live |= dict.fromkeys(inside.roots, inside)
    called = []
    for frame in _frames_from(sys._getframe(2)):
        if frame.f_code in STAND_INS:
            return None
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            if module in live:
                return live[module] if module.training else None
            called.append(module)
    return _caller_by_a_part(called) or _caller_in_a_loop()


def _caller_by_a_part(called: list[nn.Module]) -> CrossEntropyInside | None:
    """Return whose part, called by itself, makes the call; None in backward, where parts run again.

    Args:
        called: Modules whose forward is under way, the innermost first.
    """
    if not called or torch._C._current_graph_task_id() != -1:
        return None
    for inside in _LIVE:
        if inside.in_the_loop:
            continue  # corrects it anyway, and need not look through all modules
        parts = inside.parts()
        for module in called:
            if module in parts and module.training:
                return inside
    return None


def _caller_in_a_loop() -> CrossEntropyInside | None:
    """Return who corrects a call that no attached model makes, or None."""
    if not torch.is_grad_enabled():
        return None
    candidates = [inside for inside in _LIVE if inside.in_the_loop and inside.is_training]
    return max(candidates, key=_last_forward, default=None)


def _last_forward(inside: CrossEntropyInside) -> int:
    return inside.last_forward


def _frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back
