"""What a correction sees of one optimizer step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from regrad.correction import Correction

_WRAPPERS = r"_orig_mod\.|_checkpoint_wrapped_module\."


class ParameterNames:
    """Names of the optimizer's parameters in the model, kept up to date as parameters come and go.

    Args:
        model: The innermost module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[Tensor, str] = {}

    def __call__(self, parameter: Tensor, fallback: str) -> str:
        """Return the parameter's name in the model without wrappers' prefixes, or `fallback`."""
        if parameter not in self._names:
            self._names |= {p: re.sub(_WRAPPERS, "", name) for name, p in self._model.named_parameters()}
            self._names.setdefault(parameter, fallback)
        return self._names[parameter]


class Step:
    """One optimizer step, as it stands at the moment of the call.

    Attributes:
        parameters: The optimizer's trainable parameters, in the order of its groups.
        names: Their names in the model, in the same order.
        optimizer: The innermost torch optimizer.
        index: Optimizer steps completed before this one.
        correction: The correction that is running.
    """

    def __init__(self, optimizer: Optimizer, name_of: Callable[[Tensor, str], str], index: int) -> None:
        self.optimizer = optimizer
        self.index = index
        self.correction: Correction
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []
        self._groups: dict[Tensor, dict[str, Any]] = {}
        for group_index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    self.parameters.append(parameter)
                    self.names.append(name_of(parameter, f"param_groups.{group_index}.{place}"))
                    self._groups[parameter] = group

    @property
    def gradients(self) -> list[Tensor | None]:
        """`.grad` of each of `parameters`; None where there is none."""
        return [parameter.grad for parameter in self.parameters]

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the optimizer's parameter group of `parameter`."""
        return self._groups[parameter]

    def lr_of(self, parameter: Tensor) -> float | Tensor:
        """Return the learning rate that the coming update of `parameter` will use."""
        lr: float | Tensor = self._groups[parameter]["lr"]
        return lr
