"""The layouts that the core knows, and which of them a model and its optimizer have."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, optim

from regrad import sharding
from regrad.hookspecs import Layout, Step
from regrad.optimizers import parameters_of
from regrad.reading import EVERYTHING, OFFERS, Reading
from regrad.wrappers import is_kind, optimizer_layers

HIDES_MICRO = "the gradients of micro-batches are seen by nobody before they are reduced; use DDP"


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

    def move(self, open_window: Callable[[], bool]) -> bool:
        """Move the weights in place."""
        return open_window()

    def restore(self, close_window: Callable[[], bool]) -> bool:
        """Restore the weights in place."""
        return close_window()

    def true_weights(self, read_window: Callable[[], dict[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        """Return what the window kept."""
        return read_window()


class DataParallelLayout(PlainLayout):
    """DistributedDataParallel: every process has all weights and the mean of the gradients."""

    name = "ddp"


class ShardedLayout(PlainLayout):
    """DTensors on any mesh: FSDP2, tensor parallelism, or both.

    Args:
        model: As given to attach.
    """

    name = "fsdp2"
    offers = OFFERS["fsdp2"]
    is_cut = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        return HIDES_MICRO if need == "micro" else super().why_not(need)

    def gradients(self, step: Step) -> None:
        """Reduce what is a pending sum."""
        sharding.reduce_gradients(step.parameters)

    def moments(self, optimizer: optim.Optimizer) -> None:
        """Reduce what steps before attach have left as a pending sum."""
        sharding.reduce_states(optimizer)

    def move(self, open_window: Callable[[], bool]) -> bool:
        """Move this process's parts, and have them gathered anew."""
        was_moved = open_window()
        if was_moved:
            self._gather_anew()
        return was_moved

    def restore(self, close_window: Callable[[], bool]) -> bool:
        """Restore this process's parts, and have them gathered anew."""
        was_moved = close_window()
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
