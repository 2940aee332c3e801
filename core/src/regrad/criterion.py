"""The criterion that the loop calls: corrected while the model trains, the original otherwise."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from regrad.devices import random_numbers_kept
from regrad.sharding import local

if TYPE_CHECKING:
    from regrad.correction import Correction
    from regrad.engine import Engine


class Switch:
    """Chooses between two criteria.

    Args:
        engine: Says whether the model trains, and which steps are measured.
        owner: The correction that made `corrected`.
        original: The user's criterion.
        corrected: What the correction made of it; None after detach.
    """

    def __init__(self, engine: Engine, owner: Correction, original: Any, corrected: Any) -> None:
        self._engine = engine
        self._owner = owner
        self.original = original
        self.corrected = corrected

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss of the criterion that applies now."""
        if self.corrected is None:
            return self.original(*arguments, **options)
        if not self._engine.is_training():
            evaluated = getattr(self.corrected, "in_evaluation", self.original)
            return evaluated(*arguments, **options)
        self._engine.criterion_called = True
        is_eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if arguments and is_eager and self._engine.meter.due(self._owner, self._engine.applied):
            self._measure(*arguments, **options)
        with self._engine.named(self._owner, "wrap_criterion"):
            return self.corrected(*arguments, **options)

    def _measure(self, outputs: Any, *rest: Any, **options: Any) -> None:
        """Compare the gradients that both criteria send into the logits."""
        uncorrected = getattr(self.corrected, "uncorrected", self.original)
        with random_numbers_kept(_tensors_in(outputs)):
            before = _gradients(uncorrected, outputs, *rest, **options)
            after = _gradients(self.corrected, outputs, *rest, **options)
        self._engine.meter.observe(self._owner.name, "criterion", before, after)

    def describe(self) -> str:
        """Return the original in words, and what corrects it."""
        if self.corrected is None:
            return repr(self.original)
        return f"{self.original!r}, corrected by {self._owner.name!r} while the model trains"


def _gradients(criterion: Any, outputs: Any, *rest: Any, **options: Any) -> dict[str, Tensor]:
    """Return by name the gradients that a criterion sends into what the model returned.

    That is a tensor of logits, or several in a tuple, list or mapping.
    """
    copies = tree_map(_as_leaf, outputs)
    leaves = [tensor for tensor in _tensors_in(copies) if tensor.requires_grad]
    if not leaves:
        return {}
    value = criterion(copies, *rest, **options).sum()
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    numbers = ("",) if len(leaves) == 1 else range(1, len(leaves) + 1)
    named = zip(numbers, found, strict=True)
    return {f"logits{number}": local(slope) for number, slope in named if slope is not None}


def _as_leaf(value: Any) -> Any:
    """Return a floating-point tensor as the leaf of a graph of its own, and all else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


class SwitchingCriterion:
    """Stands for a criterion that is a function: calls what the switch chooses.

    Args:
        switch: Chooses between the original and the corrected criterion.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss, as the criterion does."""
        return self.switch(*arguments, **options)

    @property
    def original(self) -> Any:
        """The user's criterion."""
        return self.switch.original

    def __getattr__(self, name: str) -> Any:
        if name == "switch":  # not there yet, or no longer
            raise AttributeError(name)
        return _attribute(self.switch, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "switch":
            super().__setattr__(name, value)
        else:
            setattr(self.switch.original, name, value)

    def __repr__(self) -> str:
        return self.switch.describe()

    # A copy is the plain criterion.
    def __reduce__(self) -> Any:
        return copy.copy, (self.switch.original,)


class SwitchingModule(nn.Module):
    """Stands for a criterion that is a module, so that a model can hold it as one.

    It has the original's parameters, buffers and submodules, by the same names: moving it,
    saving its state or listing its parameters is doing so with the original. A copy or a pickle
    of it is the original.

    Args:
        switch: Chooses between the original and the corrected criterion.
    """

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        vars(self)["switch"] = switch
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = vars(switch.original)[name]
        vars(self)["training"] = switch.original.training

    @property
    def original(self) -> Any:
        """The user's criterion."""
        return vars(self)["switch"].original

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss, as the criterion does."""
        return vars(self)["switch"](*arguments, **options)

    def train(self, mode: bool = True) -> SwitchingModule:
        """Set the mode of the original too."""
        vars(self)["switch"].original.train(mode)
        vars(self)["training"] = mode
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        switch = vars(self).get("switch")
        if switch is None:  # still being made
            super().__setattr__(name, value)
        else:
            setattr(switch.original, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _attribute(vars(self)["switch"], name)

    def __repr__(self) -> str:
        return str(vars(self)["switch"].describe())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(vars(self)["switch"].original, memo)

    def __copy__(self) -> Any:
        return copy.copy(vars(self)["switch"].original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return vars(self)["switch"].original.__reduce_ex__(protocol)


def _attribute(switch: Switch, name: str) -> Any:
    """Return an attribute of the original, or else of the corrected criterion."""
    owner = switch.original if hasattr(switch.original, name) else switch.corrected
    return getattr(owner, name)


def switching_criterion(switch: Switch) -> SwitchingCriterion | SwitchingModule:
    """Return what stands for the switch's original: a module where it is one."""
    if isinstance(switch.original, nn.Module):
        return SwitchingModule(switch)
    return SwitchingCriterion(switch)
