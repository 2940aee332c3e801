"""The layouts that the core knows, and which of them a model and its optimizer have."""

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor, nn, optim

from regrad import sharding
from regrad.correction import Reading
from regrad.hookspecs import Layout, Step
from regrad.optimizers import parameters_of
from regrad.window import Window
from regrad.wrappers import is_kind, optimizer_layers

EVERYTHING: frozenset[Reading] = frozenset(get_args(Reading))


class PlainLayout:
    """Whole parameters with whole gradients: one process, or each its own copy."""

    name: str = "plain"
    offers: frozenset[Reading] = EVERYTHING
    is_cut: bool = False

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        return f"layout {self.name!r} does not offer {need!r}"

    def gradients(self, step: Step) -> None:
        """Do nothing: they are final."""

    def moments(self, optimizer: optim.Optimizer) -> None:
        """Do nothing: they lie as their parameters."""

    def commit(self, step: Step) -> None:
        """Do nothing: corrections changed the gradients themselves."""

    def sum_over(self, values: Tensor, parameter: Tensor, kept: int | None = None) -> Tensor:
        """Add nothing, unless the parameter is a shard after all."""
        return sharding.sum_over_shards(values, parameter, kept)

    def sum_over_model(self, values: Tensor) -> Tensor:
        """Add nothing: this process has the whole model."""
        return values

    def move(
        self, window: Window, step: Step, displacements: Sequence[Tensor | None] | None
    ) -> bool:
        """Move the weights in place."""
        return window.open(step.parameters, displacements)

    def restore(self, window: Window) -> bool:
        """Restore the weights in place."""
        return window.close()

    def true_weights(self, window: Window) -> dict[Tensor, Tensor]:
        """Return what the window kept."""
        return window.true_weights()


class DataParallelLayout(PlainLayout):
    """DistributedDataParallel: every process has all weights and the mean of the gradients."""

    name = "ddp"


class ShardedLayout(PlainLayout):
    """DTensors on any mesh: FSDP2, tensor parallelism, or both.

    Args:
        model: As given to attach.
    """

    name = "fsdp2"
    is_cut = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def gradients(self, step: Step) -> None:
        """Reduce what is a pending sum."""
        sharding.reduce_gradients(step.parameters)

    def moments(self, optimizer: optim.Optimizer) -> None:
        """Reduce what steps before attach have left as a pending sum."""
        sharding.reduce_states(optimizer)

    def move(
        self, window: Window, step: Step, displacements: Sequence[Tensor | None] | None
    ) -> bool:
        """Move this process's parts, and have them gathered anew."""
        was_moved = super().move(window, step, displacements)
        if was_moved:
            self._gather_anew()
        return was_moved

    def restore(self, window: Window) -> bool:
        """Restore this process's parts, and have them gathered anew."""
        was_moved = super().restore(window)
        if was_moved:
            self._gather_anew()
        return was_moved

    def _gather_anew(self) -> None:
        """Let FSDP2 forget the weights that it has gathered."""
        # Heavy to import, and only shards need it.
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class FlatLayout(PlainLayout):
    """Flat parameters of FSDP1, or an optimizer that is cut by rank: nothing is exact."""

    name = "flat"


def choose(model: nn.Module, optimizer: Any) -> Layout:
    """Return how the weights lie.

    Args:
        model: As given to attach; of several, a `ModuleList` of them.
        optimizer: As given to attach.
    """
    layers = optimizer_layers(optimizer)
    modules = list(model.modules())
    if any(is_kind(layer, "zeroredundancyoptimizer") for layer in layers):
        return FlatLayout()
    if any(is_kind(module, "fullyshardeddataparallel") for module in modules):
        return FlatLayout()
    if any(sharding.is_sharded(parameter) for parameter in parameters_of(layers[-1])):
        return ShardedLayout(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        return DataParallelLayout()
    return PlainLayout()
