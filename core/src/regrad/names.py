"""The names of an optimizer's parameters, by which corrections keep their state."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, optim

from regrad.module_hooks import WRAPPER


def parameter_names(model: nn.Module, optimizer: optim.Optimizer) -> dict[Tensor, str]:
    """Return a name for each parameter of the optimizer, frozen ones included.

    A parameter of the model has its name there, without the prefixes of wrappers. A parameter
    outside the model, as in a learnt loss, is named by its group and its position there, which
    neither unfreezing nor resuming changes.
    """
    in_model = {p: re.sub(WRAPPER, "", name) for name, p in model.named_parameters()}
    names: dict[Tensor, str] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            names[parameter] = in_model.get(parameter, f"unnamed.{group_index}.{index}")
    return names


def names_in_groups(optimizer: optim.Optimizer) -> dict[Tensor, str]:
    """Return the names that an optimizer's groups give their parameters, as `param_names`."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    return names


def with_new_names(state: Any, new: Mapping[str, str]) -> Any:
    """Return a copy of nested mappings, with the keys in `new` replaced."""
    if not isinstance(state, Mapping):
        return state
    return {new.get(key, key): with_new_names(value, new) for key, value in state.items()}


def mentions(state: Any, names: Mapping[str, str]) -> bool:
    """Say whether nested mappings have a key in `names`."""
    if not isinstance(state, Mapping):
        return False
    return any(key in names or mentions(value, names) for key, value in state.items())
