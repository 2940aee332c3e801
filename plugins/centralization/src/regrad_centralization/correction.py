"""Gradient centralization as a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any, Literal

from regrad import Attachment, Correction, RegradError
from regrad.correction import Needs
from regrad.hookspecs import Step
from regrad.optimizers import stepped_by
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from regrad_centralization.functional import Unit, subtract_, unit_means
from regrad_centralization.units import units_of

# By class, exactly: these add weight_decay times the weight to the gradient, unless a group says
# that its decay is decoupled.
COUPLED = (SGD, Adam, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, ASGD)


def coupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return what the optimizer adds to the gradient per unit of weight, or None if it does not.

    Under `maximize` the decay is added to the negated gradient, so it is negative here.
    """
    if type(stepped_by(optimizer)) not in COUPLED or group.get("decoupled_weight_decay"):
        return None
    decay = float(group["weight_decay"])
    return -decay if group.get("maximize") else decay


class Centralization(Correction):
    r"""Subtract the mean from every output's gradient, or from what the optimizer does to it.

    For output :math:`i` of a layer with M weights per output, gradient G and weight W,

    .. math:: G_i \leftarrow G_i - \frac{1}{M} \sum_j (G_{ij} + \lambda W_{ij}),

    where :math:`\lambda = 0` for the placement "gradient", and for "decayed" the
    coupled weight decay of the optimizer's group, so that the optimizer, which adds
    :math:`\lambda W` itself, works with a gradient whose means are zero: the mean
    of every output's weights then never moves under SGD. For "update" the optimizer's step
    Δ, without decoupled decay, is centred in place of G:

    .. math:: \Delta_i \leftarrow \Delta_i - \frac{1}{M} \sum_j \Delta_{ij},

    so that the mean moves on no optimizer, but for decoupled decay. Biases, norms, gains,
    tables, embeddings, depthwise convolutions and outputs with one weight are left
    alone.

    Args:
        placement: "gradient" centres the gradient of the loss, "decayed" its sum with
            the coupled weight decay, "update" what the optimizer adds to the weights.
        conv_only: Centre only the weights of convolutions.

    Raises:
        TypeError: If an option has any other value.
        RegradError: At attach, for "decayed" on an optimizer whose decay is decoupled
            or unknown.

    Example:
        >>> Centralization(placement="decayed")
        Centralization(placement='decayed', conv_only=False)

    References:
        Yong, Huang, Hua and Zhang, 2020, "Gradient Centralization: A New Optimization
        Technique for Deep Neural Networks", sections 3.2 and 4. "update" is
        `gc_loc=False` of the authors' code, which they advise for Adam and its
        relatives. Transposed convolutions are centred per output, which is their
        dimension 1 within each group; the published code takes dimension 0, which
        counts their inputs.
    """

    name = "centralization"
    needs = Needs(
        stages=("gradient", "update"),
        closures=True,
        sparse=True,
        before=("gcw",),
        reads=("units",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is centred, and in which tensors."""

        placement: Literal["gradient", "decayed", "update"] = "gradient"
        conv_only: bool = False

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.placement == "update":
            # The step of a sparse gradient is dense: its means would move rows without a gradient.
            self.needs = with_changes(self.needs, stages=("update",), sparse=False)
        else:
            self.needs = with_changes(self.needs, stages=("gradient",))
        self._units: dict[str, Unit | None] = {}

    def setup(self, attachment: Attachment) -> None:
        """Read the units from the modules' types; refuse decay that is not in the gradient."""
        self._units = units_of(attachment.model, conv_only=self.options.conv_only)
        for group in attachment.optimizer.param_groups:
            self._decay(attachment.optimizer, group)

    def _decay(self, optimizer: Optimizer, group: Mapping[str, Any]) -> float:
        """Return the decay that is centred with the gradient; raise `RegradError` if unknown."""
        if self.options.placement != "decayed":
            return 0.0
        decay = coupled_decay(optimizer, group)
        if decay is None:
            known = ", ".join(kind.__name__ for kind in COUPLED)
            raise RegradError(
                "'centralization' with placement='decayed' needs weight decay that is added to "
                f"the gradient, as by torch's {known}; {type(optimizer).__name__} decouples it or "
                "is unknown; use placement='gradient'"
            )
        return decay

    def correct_gradients(self, step: Step) -> None:
        """Centre the gradients of the step."""
        self._read_new_units(step.names)
        waiting: list[Tensor] = []
        waiting_means: list[Tensor] = []
        for name, parameter in step.named_parameters():
            unit = self._units.get(name)
            gradient = parameter.grad
            if unit is None or gradient is None or gradient.is_sparse:
                continue
            means = self._means(step, parameter, gradient, unit)
            if gradient.is_cpu:  # while it is still in the cache
                subtract_([gradient], [means])
            else:
                waiting.append(gradient)
                waiting_means.append(means)
        subtract_(waiting, waiting_means)  # in one launch

    def correct_update(self, step: Step) -> None:
        """Centre what the optimizer did."""
        for name, displacement in step.named_displacements():
            unit = self._units.get(name)
            if unit is not None:
                subtract_([displacement], [unit_means(displacement, unit)])

    def _read_new_units(self, names: Sequence[str]) -> None:
        """Read the units again if there are parameters of which none is known."""
        if not self._units.keys() >= {*names}:
            self._units |= units_of(self.attachment.model, conv_only=self.options.conv_only)
            # What is outside of the model has no layer, and is not looked for again.
            self._units = dict.fromkeys(names) | self._units

    def _means(self, step: Step, parameter: nn.Parameter, gradient: Tensor, unit: Unit) -> Tensor:
        """Return the means to subtract from one gradient."""
        means = unit_means(gradient, unit)
        decay = self._decay(step.optimizer, step.group_of(parameter))
        if decay == 0:
            return means
        return means.add_(unit_means(parameter, unit), alpha=decay)

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter is centred."""
        if self.attachment is not None:
            self._read_new_units([name])
        return self._units.get(name) is not None

    def idle_reason(self) -> str:
        """Say why no gradient may have changed."""
        if not any(self._units.values()):
            kind = "convolution" if self.options.conv_only else "layer"
            return f"the model has no {kind} with several weights per output"
        what = "steps'" if self.options.placement == "update" else "gradients'"
        return f"the {what} means were already zero"
