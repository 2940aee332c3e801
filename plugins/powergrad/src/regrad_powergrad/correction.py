"""PowerGrad as a correction: the user's own criterion, with a different gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regrad.correction import Control, Correction, Needs
from regrad.correction import Options as NoOptions
from regrad.signatures import takes
from torch import Tensor, nn, optim
from torch.nn import functional as F

from regrad_powergrad.functional import check_alpha, power_grad_cross_entropy
from regrad_powergrad.loss import PowerGradCrossEntropyLoss, calibrated, with_settings_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

# By class, exactly: a subclass may step differently.
PROPORTIONAL: tuple[type[Optimizer], ...] = (optim.SGD,)
SCALE_INVARIANT: tuple[type[Optimizer], ...] = (
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.RMSprop,
)


class PowerGrad(Correction):
    r"""Flatten the softmax in the gradient of cross entropy.

    The logit gradient :math:`c\,(p - q)` becomes :math:`c\,(p' - q)` with
    :math:`p' = \mathrm{softmax}(\alpha z)`; the reported value stays plain cross
    entropy, and evaluation is untouched. The rule is
    `regrad_powergrad.functional.power_grad_cross_entropy`.

    Args:
        alpha: :math:`\alpha` in (0, 1], without a unit; 1 changes nothing. The
            authors take .25 for ResNet-18 and .3 for ResNet-50 and 101.

    Raises:
        ValueError: If `alpha` is not in (0, 1].
        TypeError: On attach, if the criterion is neither `nn.CrossEntropyLoss`
            nor `F.cross_entropy`.

    Example:
        >>> PowerGrad(alpha=0.3)
        PowerGrad(alpha=0.3)
        >>> PowerGrad().wrap_criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
        PowerGradOf(
          alpha=0.25
          (criterion): CrossEntropyLoss()
        )

    References:
        Das, Mondal, Lall, Joshi and Dutta Roy, 2021, "Altering Backward Pass
        Gradients improves Convergence" (arXiv 2111.12495), PowerGrad Transform.
        We differ from the published code, which is exact only for one loss scale.
    """

    name = "powergrad"
    needs = Needs(
        stages=("criterion",),
        closures=True,
        sparse=True,
        reads=("criterion",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options(NoOptions):
        """How flat the softmax is."""

        alpha: float = 0.25

        def __post_init__(self) -> None:
            check_alpha(self.alpha)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def wrap_criterion(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `criterion` with the corrected gradient; its settings and tensors stay the user's.

        Args:
            criterion: An `nn.CrossEntropyLoss` (or a subclass with its forward), whose
                arguments are read at every call; `F.cross_entropy`; or a
                `functools.partial` of it.

        Raises:
            TypeError: If it is anything else.
        """
        alpha = self.options.alpha
        if criterion is F.cross_entropy:
            return _cross_entropy(alpha)
        if isinstance(criterion, partial) and criterion.func is F.cross_entropy:
            return partial(_cross_entropy(alpha), *criterion.args, **criterion.keywords)
        if isinstance(criterion, PowerGradCrossEntropyLoss):
            raise TypeError(
                "criterion must be plain cross entropy, got a PowerGradCrossEntropyLoss, which is "
                "PowerGrad already; use it alone, or attach powergrad to an nn.CrossEntropyLoss"
            )
        if (
            isinstance(criterion, nn.CrossEntropyLoss)
            and type(criterion).forward is nn.CrossEntropyLoss.forward
        ):
            return PowerGradOf(criterion, alpha=alpha)
        raise TypeError(
            "criterion must be nn.CrossEntropyLoss or torch.nn.functional.cross_entropy, got "
            f"{criterion!r}; if a loss contains a cross entropy, replace that part with "
            "regrad_powergrad.PowerGradCrossEntropyLoss"
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return softmax(alpha z) of `logits` [C] or [N, C, ...], the probabilities it fits."""
        return calibrated(logits, self.options.alpha)

    def control(self, optimizer: Optimizer) -> Control | None:
        r"""Return plain cross entropy with a rescaled linear head and rates.

        With a linear head :math:`z = W h + b`, start from :math:`\alpha W, \alpha b`.
        Plain cross entropy then sees :math:`\alpha z`, so its logit gradient, and with
        it the head's, is PowerGrad's; for the head to stay :math:`\alpha` times as
        large, its steps must be too: head rate :math:`\alpha \eta`. The gradient that
        goes on to the body is :math:`\alpha` times as large: body rate
        :math:`\eta / \alpha` where steps are proportional to gradients (SGD, with any
        momentum), and :math:`\eta` where they do not depend on their scale (Adam's
        relatives).

        Without weight decay the two are equal: for SGD to rounding, for Adam's
        relatives up to `eps` (and Adagrad's initial accumulator), except that RAdam's
        first five steps are proportional. With weight decay they are equal if the
        head's decay is divided by alpha and the body's, where it is coupled, multiplied
        by alpha; a `Control` cannot say that yet.
        """
        alpha = self.options.alpha
        if alpha == 1 or type(optimizer) not in PROPORTIONAL + SCALE_INVARIANT:
            return None
        body_lr = 1 / alpha if type(optimizer) in PROPORTIONAL else 1.0
        return Control(name="scaled-head", head_init=alpha, head_lr=alpha, body_lr=body_lr)

    def idle_reason(self) -> str:
        """Say why the gradient may have stayed that of plain cross entropy."""
        if self.options.alpha == 1:
            return "alpha is 1, which is plain cross entropy"
        return (
            "the loop did not call attachment.criterion on logits that need a gradient "
            "in training mode"
        )


class PowerGradOf(nn.Module):
    """A user's criterion with the corrected gradient.

    Its weight and its other settings are read from it at every call: moving or
    changing the original moves or changes this.
    """

    def __init__(self, criterion: nn.CrossEntropyLoss, *, alpha: float) -> None:
        super().__init__()
        self.criterion = criterion
        self.alpha = alpha

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - as in nn
        """Return the loss of logits `input`, shape [N, C, ...], against `target`."""
        return with_settings_of(self.criterion, input, target, alpha=self.alpha)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return softmax(alpha z) of `logits` [C] or [N, C, ...], the probabilities it fits."""
        return calibrated(logits, self.alpha)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"alpha={self.alpha}"


def _cross_entropy(alpha: float) -> Callable[..., Tensor]:
    """Return a function like `F.cross_entropy`, without its deprecated arguments."""

    def cross_entropy(
        input: Tensor,  # noqa: A002 - the name in F.cross_entropy
        target: Tensor,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return power_grad_cross_entropy(
            input,
            target,
            alpha=alpha,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    return cross_entropy
