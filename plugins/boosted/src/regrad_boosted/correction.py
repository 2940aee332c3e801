"""Boosted exits as a correction: the user's own criterion, on what earlier exits leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from regrad.correction import Control, Correction, Needs
from regrad.correction import Options as NoOptions
from regrad.signatures import takes
from torch import Tensor, nn
from torch.nn import functional as F

from regrad_boosted.functional import (
    boosted_logits,
    check_alpha,
    check_decay,
    check_exit_weights,
    exit_loss,
    running_sum,
    weighted_sum,
)
from regrad_boosted.measures import LastBatch
from regrad_boosted.rescaling import average_over_exits

if TYPE_CHECKING:
    from torch.optim import Optimizer

IN_ONE_TENSOR = (
    "rescale must see which exits use a parameter, and FSDP1 holds all of them in one tensor; "
    "use FSDP2 or rescale=False"
)
OF_ONE_EXIT = "exit_criterion"
"""The attribute by which a criterion for several outputs names that of one."""


class Boosted(Correction):
    r"""Train each exit of a network on what the exits before it leave.

    The model returns the logits :math:`z_1, \dots, z_N` of its exits. The loss becomes

    .. math:: \sum_n w_n\,\mathrm{CE}\bigl(z_n + \tau\,\mathrm{stop}(F_{n-1}), y\bigr),
        \qquad F_n = z_n + \tau F_{n-1},

    and the prediction of exit n is :math:`F_n`: see `predictions`. The rule is
    `regrad_boosted.functional.boosted_cross_entropy`.

    Args:
        decay: :math:`\tau` in [0, 1], how much of the earlier exits' sum an exit starts from; 0 is
            the plain sum of losses.
        exit_weights: :math:`w_n`, positive, one per exit; empty for 1 each.
        alpha: Exponent in (0, 1] of the flattened softmax in the gradient (PowerGrad), which as a
            correction of its own could not share the criterion; 1 leaves the gradient alone.
        rescale: Whether what several exits use receives the mean of their gradients instead of the
            sum.
        exits: Where the model returns a mapping: the names of the logits, in the order of the
            exits.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: On attach, if the criterion is not cross entropy; on a call, if the model did not
            return logits, in a tuple, list or mapping.

    Example:
        >>> Boosted(decay=0.5)
        Boosted(decay=0.5, exit_weights=(), alpha=1.0, rescale=False, exits=())
        >>> boosted = Boosted().wrap_criterion(nn.CrossEntropyLoss())
        >>> outputs = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
        >>> boosted(outputs, torch.tensor([0]))  # .1269 at (2, 0) and .3133 at (1, 0)
        tensor(0.4402)

    References:
        Yu, Li, Hua, Huang and Shi, 2023, "Boosted Dynamic Neural Networks" (arXiv 2211.16726). We
        differ: one decay for all exits and for training and evaluation, no equalisation of the
        losses, and rescaling is off unless asked for.
    """

    name = "boosted"
    needs = Needs(
        stages=("criterion",),
        closures=True,
        sparse=True,
        reads=("criterion",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options(NoOptions):
        """How much an exit knows of those before it, and how their gradients meet."""

        decay: float = 0.5
        exit_weights: tuple[float, ...] = ()
        alpha: float = 1.0
        rescale: bool = False
        exits: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_decay(self.decay)
            check_exit_weights(self.exit_weights)
            check_alpha(self.alpha)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.rescale:
            reads = (*self.needs.reads, "model")
            conflicts = {"flat": IN_ONE_TENSOR}
            self.needs = with_changes(self.needs, reads=reads, conflicts=conflicts)
        self._last_batch = LastBatch()

    def wrap_criterion(self, criterion: Callable[..., Tensor]) -> BoostedOf:
        """Return `criterion` on the exits of a model; its settings and tensors stay the user's.

        Args:
            criterion: An `nn.CrossEntropyLoss` (or a subclass with its forward), whose arguments
                are read at every call; `F.cross_entropy`; a `functools.partial` of it with
                keywords; or a criterion for several outputs that names one of these, which it
                applies to each, by the attribute `exit_criterion`.

        Raises:
            TypeError: If it is anything else.
        """
        of_one_exit = getattr(criterion, OF_ONE_EXIT, criterion)
        if not _is_cross_entropy(of_one_exit):
            raise TypeError(
                "criterion must be nn.CrossEntropyLoss or torch.nn.functional.cross_entropy, got "
                f"{criterion!r}; if a loss contains a cross entropy of several exits, replace that "
                "part with regrad_boosted.functional.boosted_cross_entropy"
            )
        return BoostedOf(criterion, of_one_exit, self.options, self._last_batch)

    def predictions(self, outputs: Any) -> list[Tensor]:
        """Return the logits that each exit predicts with: F_n of what the model returned."""
        return running_sum(exits_in(outputs, self.options.exits), decay=self.options.decay)

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return the plain sum of the exits' losses, with the same rescaling.

        None without rescaling: training without a correction is the plain sum already.
        """
        if self.options.decay == 0 or not self.options.rescale:
            return None
        plain_sum = Boosted(decay=0.0, rescale=True, exits=self.options.exits)
        return Control(name="rescaled-sum", corrections=(plain_sum.as_text(),))

    def metrics(self) -> dict[str, float]:
        """Return, of each exit on the last training batch, loss, accuracy and share of increment.

        The share of exit n is |z_n| / |F_n|: how much of its prediction is its own.
        """
        return self._last_batch.metrics()

    def idle_reason(self) -> str | None:
        """Say why the gradient may have stayed that of the plain sum."""
        if self.options.decay == 0:
            return None  # the control: it may rescale, which no logit shows
        if self._last_batch.exits == 1:
            return "the model has one exit, which has none before it"
        return (
            "the loop did not call attachment.criterion on logits that need a gradient "
            "in training mode"
        )


class BoostedOf(nn.Module):
    """A user's criterion on several exits, each at what the exits before it leave.

    Its weight and its other settings are read from it at every call: moving or changing the
    original moves or changes this.

    Args:
        original: What the user gave.
        of_one_exit: The cross entropy of one exit, which may be `original` itself.
        options: Of the correction.
        last_batch: Told what each call saw.
    """

    def __init__(
        self, original: Any, of_one_exit: Any, options: Boosted.Options, last_batch: LastBatch
    ) -> None:
        super().__init__()
        self.original = original
        self.of_one_exit = of_one_exit
        self.options = options
        self._last_batch = last_batch

    def forward(self, input: Any, target: Tensor, **settings: Any) -> Tensor:  # noqa: A002
        """Return the loss of what a model returned, each exit [N, C, ...], against `target`."""
        options = self.options
        outputs = exits_in(input, options.exits)
        if options.rescale:
            average_over_exits(outputs)
        settings = {**_settings_of(self.of_one_exit), **settings}
        logits = boosted_logits(outputs, decay=options.decay)
        losses = [exit_loss(each, target, alpha=options.alpha, **settings) for each in logits]
        if not torch.compiler.is_compiling():
            self._last_batch.keep(outputs, logits, losses, target, settings)
        return weighted_sum(losses, options.exit_weights)

    def in_evaluation(self, input: Any, target: Tensor, **settings: Any) -> Any:  # noqa: A002
        """Return the user's criterion on the last exit's prediction.

        A criterion for several outputs is given all of them, unchanged, as is one tensor, which
        some models return in evaluation mode.
        """
        if self.of_one_exit is not self.original or isinstance(input, Tensor):
            return self.original(input, target, **settings)
        return self.original(self.predictions(input)[-1], target, **settings)

    def uncorrected(self, input: Any, target: Tensor, **settings: Any) -> Any:  # noqa: A002
        """Return the plain sum of losses, with which the effect meter compares."""
        if self.of_one_exit is not self.original:
            return self.original(input, target, **settings)
        outputs = exits_in(input, self.options.exits)
        return weighted_sum([self.original(output, target, **settings) for output in outputs])

    def predictions(self, outputs: Any) -> list[Tensor]:
        """Return the logits that each exit predicts with: F_n of what the model returned."""
        return running_sum(exits_in(outputs, self.options.exits), decay=self.options.decay)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


def exits_in(outputs: Any, names: Sequence[str]) -> Sequence[Tensor]:
    """Return the logits of the exits in what a model returned.

    Args:
        outputs: A tuple or list of logits, a mapping that holds them, or the logits of a single
            exit.
        names: Of the logits in a mapping, in the order of the exits; empty for a sequence.

    Raises:
        TypeError: If `outputs` is none of these, or there are names and it is not a mapping.
        ValueError: If a mapping lacks a name, or there are no names for it.

    Example:
        >>> exits_in({"aux": torch.zeros(1), "main": torch.ones(1)}, ["aux", "main"])
        [tensor([0.]), tensor([1.])]
    """
    if isinstance(outputs, Mapping):
        known = ", ".join(map(str, outputs))
        if not names:
            raise ValueError(
                f"exits must name the logits in the mapping that the model returns, got none; "
                f"there are {known}"
            )
        missing = [name for name in names if name not in outputs]
        if missing:
            raise ValueError(
                f"exits must name entries of what the model returns, got {missing[0]!r}; "
                f"there are {known}"
            )
        return [outputs[name] for name in names]
    if names:
        raise TypeError(
            "model must return a mapping where exits names its entries, got "
            f"{type(outputs).__name__}; leave exits out"
        )
    if isinstance(outputs, Tensor):
        return [outputs]
    if not isinstance(outputs, list | tuple):
        raise TypeError(
            "model must return the logits of its exits in a tuple, list or mapping, got "
            f"{type(outputs).__name__}"
        )
    return outputs


def _is_cross_entropy(criterion: Any) -> bool:
    """Say whether a criterion is torch's cross entropy of one tensor of logits."""
    if isinstance(criterion, partial):
        return criterion.func is F.cross_entropy and not criterion.args
    if isinstance(criterion, nn.CrossEntropyLoss):
        return type(criterion).forward is nn.CrossEntropyLoss.forward
    return criterion is F.cross_entropy


def _settings_of(criterion: Any) -> dict[str, Any]:
    """Return the arguments that a cross entropy has now."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        return {name: getattr(criterion, name) for name in names}
    return dict(criterion.keywords) if isinstance(criterion, partial) else {}
