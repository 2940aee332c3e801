"""What a unit of each parameter is, by its module's type, and which module is the head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from regrad.correction import did_you_mean
from regrad.hooks import WRAPPER, Call
from torch import Tensor, nn

from regrad_clipping.functional import Unit

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Their tensors of rank 2 and more have the outputs in dimension 0, however small the others are.
BY_ROW = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
)
GAINS = (nn.LayerNorm, nn.RMSNorm)


def unit_of(module: nn.Module, name: str, parameter: Tensor) -> Unit:
    """Return what counts as one unit of a parameter.

    Args:
        module: The module that holds it.
        name: Its name there, such as "weight".
        parameter: Shape [*], plain or DTensor.

    Returns:
        The fan-in of one output for layers; the whole tensor for vectors, scalars and gains.

    Example:
        >>> layer = nn.ConvTranspose2d(4, 6, 3)
        >>> unit_of(layer, "weight", layer.weight)
        Unit(axis=1, groups=1)
    """
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_bias":
        return Unit(None, 3)
    if parameter.dim() < 2 or isinstance(module, GAINS):
        return Unit(None)
    if isinstance(module, TRANSPOSED):
        return Unit(1, module.groups)
    is_shaped_like_a_gain = parameter.numel() == max(parameter.shape)
    if is_shaped_like_a_gain and not isinstance(module, BY_ROW):
        return Unit(None)
    return Unit(0)


@dataclass(frozen=True)
class Holding:
    """One parameter in one module.

    Attributes:
        module: The module's name in the model, without wrappers.
        attribute: The parameter's name in the module.
        known_as: Its name in the optimizer's step; of a tied parameter, the first of its names.
        unit: What a unit of it is.
        rank: Its number of dimensions.
    """

    module: str
    attribute: str
    known_as: str
    unit: Unit
    rank: int

    @property
    def is_weight(self) -> bool:
        """Say whether this is what its layer calls its weight, or a factor of it."""
        return self.attribute == "weight"


def holdings(model: nn.Module) -> list[Holding]:
    """Return every parameter of the model in every module that holds it, in module order."""
    first_names: dict[Tensor, str] = {}
    found = []
    for path, module in model.named_modules():
        where = re.sub(WRAPPER, "", f"{path}.").rstrip(".")
        for name, parameter in module.named_parameters(recurse=False):
            known_as = first_names.setdefault(parameter, f"{where}.{name}".lstrip("."))
            # Weight norm and its like keep the factors of a weight in modules of their own.
            owner, _, factor = where.partition("parametrizations.")
            unit = unit_of(module, name, parameter)
            if factor:
                held = Holding(owner.rstrip("."), factor, known_as, unit, parameter.dim())
            else:
                held = Holding(where, name, known_as, unit, parameter.dim())
            found.append(held)
    return found


def head_modules(model: nn.Module, calls: Sequence[Call], held: Sequence[Holding]) -> list[str]:
    """Return the modules that make the model's output, else the last linear layer that was called.

    Args:
        model: The innermost module.
        calls: What the first training forward called, in order.
        held: Its parameters.

    Returns:
        Names of layers that hold a weight of rank 2 at least; empty if there is none.
    """
    if isinstance(model, nn.Linear):
        return [""]
    layers = {holding.module for holding in held if holding.is_weight and holding.rank > 1}
    linear = {
        re.sub(WRAPPER, "", name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    makers: list[str] = []
    last_linear: list[str] = []
    for call in calls:
        name = re.sub(WRAPPER, "", call.name)
        if call.makes_output and name in layers and name not in makers:
            makers.append(name)
        if name in linear:
            last_linear = [name]
    return makers or last_linear


def has_forward(module: nn.Module) -> bool:
    """Say whether a module can be called: a `ModuleList`, for example, cannot."""
    return type(module).forward is not nn.Module.forward


def check_head(name: str, held: Sequence[Holding]) -> None:
    """Raise `ValueError` unless `name` is a module with a weight."""
    layers = list(dict.fromkeys(holding.module for holding in held if holding.is_weight))
    if name in layers:
        return
    inside = [layer for layer in layers if layer.startswith(f"{name}.")]
    near = f"; did you mean {inside[-1]!r}?" if inside else did_you_mean(name, layers)
    raise ValueError(f"head must name a module that has a weight, got {name!r}{near}")
