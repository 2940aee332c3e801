"""Where the divisor of each parameter comes from, by its name in the model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from regrad.hooks import WRAPPER
from torch import nn

from regrad_adafisher.layers import own_parameters


class Place(NamedTuple):
    """Where the divisor of a parameter comes from.

    Attributes:
        layer: Name of the module that holds it.
        is_bias: Whether its divisor takes the last element of H, and not those before it.
    """

    layer: str
    is_bias: bool


class Holder(NamedTuple):
    """A module that holds a parameter.

    Attributes:
        path: The module's name in the model, without wrappers.
        attribute: The parameter's name in the module.
        module: The module.
    """

    path: str
    attribute: str
    module: nn.Module

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.attribute}".lstrip(".")


def places_of(model: nn.Module, layer_names: Mapping[str, str]) -> dict[str, Place]:
    """Return the place of each parameter that has a divisor, by its name in the model.

    A parameter that modules share which are not one layer is left out: each of them sees a part of
    its gradient.

    Args:
        model: The innermost module.
        layer_names: The name of the layer to which each module of a layer belongs.
    """
    places: dict[str, Place] = {}
    for holders in _holders_of(model).values():
        first = holders[0]
        layer = layer_names.get(first.path)
        layers = {layer_names.get(holder.path) for holder in holders}
        if layer is None or len(layers) > 1:
            continue
        if first.attribute in own_parameters(first.module):
            places[first.name] = Place(layer, first.attribute == "bias")
    return places


def kinds_of_holders(model: nn.Module) -> dict[str, str]:
    """Return what holds each parameter, by its name: a class, or that several modules share it."""
    kinds: dict[str, str] = {}
    for holders in _holders_of(model).values():
        first = holders[0]
        is_shared = len(holders) > 1
        kinds[first.name] = (
            "shared by several modules" if is_shared else type(first.module).__name__
        )
    return kinds


def _holders_of(model: nn.Module) -> dict[nn.Parameter, list[Holder]]:
    """Return the modules that hold each parameter."""
    holders: dict[nn.Parameter, list[Holder]] = defaultdict(list)
    for path, module in model.named_modules():
        without_wrappers = re.sub(WRAPPER, "", f"{path}.").rstrip(".")
        for attribute, parameter in module.named_parameters(recurse=False):
            holders[parameter].append(Holder(without_wrappers, attribute, module))
    return holders
