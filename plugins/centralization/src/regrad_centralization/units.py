"""Which parameters are centred, and what one output of each is, by the type of their module."""

from __future__ import annotations

import re

from regrad.hooks import WRAPPER
from torch import Tensor, nn

from regrad_centralization.functional import Unit

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BY_ROW = (nn.Linear, nn.Bilinear, nn.RNNBase)
NEVER = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def unit_of(
    module: nn.Module, name: str, parameter: Tensor, *, conv_only: bool = False
) -> Unit | None:
    """Return what belongs to one output of a parameter, or None if it is not centred.

    Args:
        module: The module that holds it.
        name: Its name there, such as "weight".
        parameter: Shape [*], plain or DTensor.
        conv_only: Centre only the weights of convolutions.

    Returns:
        None for vectors, biases, gains, tables, depthwise convolutions and layers whose
        outputs have one weight each.

    Example:
        >>> layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
        >>> unit_of(layer, "weight", layer.weight)
        Unit(axis=1, groups=2)
        >>> unit_of(layer, "bias", layer.bias)
    """
    if parameter.dim() < 2 or "bias" in name or isinstance(module, NEVER):
        return None
    if isinstance(module, CONVOLUTIONS):
        is_depthwise = module.groups == module.in_channels > 1
        unit = Unit(1, module.groups) if isinstance(module, TRANSPOSED) else Unit()
        return None if is_depthwise else _unless_single(unit, parameter)
    if conv_only:
        return None
    # In other modules a first dimension of 1 means a position table or a token, and a single
    # long dimension a gain.
    is_table = parameter.shape[0] == 1 or parameter.numel() == max(parameter.shape)
    if is_table and not isinstance(module, BY_ROW):
        return None
    return _unless_single(Unit(), parameter)


def _unless_single(unit: Unit, parameter: Tensor) -> Unit | None:
    """Return the unit, or None if it is one element, which would become zero."""
    units = parameter.shape[unit.axis] * unit.groups
    return unit if parameter.numel() > units else None


def units_of(model: nn.Module, *, conv_only: bool) -> dict[str, Unit | None]:
    """Return the unit of every parameter by name; None if any module that holds it excludes it."""
    names: dict[Tensor, str] = {}
    units: dict[str, Unit | None] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            own_name = re.sub(WRAPPER, "", f"{path}.{name}").lstrip(".")
            known_as = names.setdefault(parameter, own_name)
            unit = unit_of(module, name, parameter, conv_only=conv_only)
            if unit is not None:
                unit = units.get(known_as, unit)
            units[known_as] = unit
    return units
