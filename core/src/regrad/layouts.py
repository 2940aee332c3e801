"""The layouts that the core knows, and which of all layouts a model and its optimizer have."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pluggy
from torch import Tensor, distributed, nn, optim

from regrad import registry, sharding
from regrad.errors import PluginLoadError
from regrad.hookspecs import Layout, LayoutSpec, OwnStep, Step, hookimpl
from regrad.optimizers import parameters_of
from regrad.reading import EVERYTHING, OFFERS, Reading
from regrad.wrappers import is_kind, optimizer_layers

LAYOUT_HOOK = "regrad_layout"
FLAT = (
    "FSDP1 lays several parameters out in one flat tensor and cuts it anywhere; "
    "use FSDP2 (torch.distributed.fsdp.fully_shard)"
)
PARTITIONED = (
    "ZeroRedundancyOptimizer keeps the moments of a parameter on one process; use its optimizer "
    "without it, or FSDP2"
)
HIDES_MICRO = "the gradients of micro-batches are seen by nobody before they are reduced; use DDP"
LOCAL = (
    "with {wrapper} each process trains by itself between two averages of the weights; "
    "use DDP alone"
)


class PlainLayout:
    """Whole parameters with whole gradients: one process, or each its own copy.

    Args:
        model_group: As given to attach.
        why_no_micro: Why the processes do not take their steps together, so that the
            micro-batches of a step cannot be read; None if they do.
    """

    name: str = "plain"
    offers: frozenset[Reading] = EVERYTHING
    is_cut: bool = False
    is_restored_to_save: bool = False
    own_step: OwnStep | None = None

    def __init__(self, model_group: Any = None, *, why_no_micro: str | None = None) -> None:
        self.model_group = model_group
        self._why_no_micro = why_no_micro
        if why_no_micro is not None:
            self.offers = self.offers - {"micro"}

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        if need == "micro" and self._why_no_micro is not None:
            return self._why_no_micro
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
        """Add over the group that attach was given; nothing without one."""
        if self.model_group is not None:
            distributed.all_reduce(values, group=self.model_group)
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
        model_group: As given to attach.
    """

    name = "fsdp2"
    offers = OFFERS["fsdp2"]
    is_cut = True

    def __init__(self, model: nn.Module, model_group: Any = None) -> None:
        super().__init__(model_group)
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
    """FSDP1: each process has a stretch of flat tensors that hold several parameters.

    Args:
        model: As given to attach.
        model_group: As given to attach.
    """

    name = "flat"
    offers = OFFERS["flat"]
    is_cut = True
    is_restored_to_save = True

    def __init__(self, model: nn.Module, model_group: Any = None) -> None:
        super().__init__(model_group)
        self._model = model

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        return HIDES_MICRO if need == "micro" else FLAT

    def moments(self, optimizer: optim.Optimizer) -> None:
        """Let parameters be this process's parts again, as the optimizer's state is."""
        self._show_parts()

    def restore(self, close_window: Callable[[], bool]) -> bool:
        """Restore this process's parts, and have them gathered anew."""
        self._show_parts()
        return close_window()

    def _show_parts(self) -> None:
        """Free what FSDP1 has gathered: an evaluation leaves the outermost module so."""
        for module in self._model.modules():
            if is_kind(module, "fullyshardeddataparallel") and _has_gathered(module):
                handle: Any = module._handle
                handle.reshard(free_unsharded_flat_param=True)
                handle.post_reshard()


def _has_gathered(module: Any) -> bool:
    """Say whether a module of FSDP1 holds whole weights now, for which torch has no public name."""
    handle = module._handle
    if handle is None or not handle.uses_sharded_strategy:
        return False
    # Before the first forward there is no room to gather into.
    has_room = hasattr(handle.flat_param, "_full_param_padded")
    return has_room and not handle.needs_unshard()


class PartitionedLayout(PlainLayout):
    """ZeroRedundancyOptimizer: whole parameters and gradients, each stepped by one process."""

    name = "zero-redundancy"
    offers = OFFERS["zero-redundancy"]

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        return PARTITIONED if need == "moments" else super().why_not(need)


class OwnLayouts:
    """The layouts of the core, as a plugin that is asked last."""

    @hookimpl
    def regrad_layout(self, model: nn.Module, optimizer: Any, model_group: Any) -> Layout:
        """Return how the weights lie; as in one process where nothing else is known."""
        layers = optimizer_layers(optimizer)
        if any(is_kind(layer, "zeroredundancyoptimizer") for layer in layers):
            return PartitionedLayout(model_group)
        modules = list(model.modules())
        if any(is_kind(module, "fullyshardeddataparallel") for module in modules):
            return FlatLayout(model, model_group)
        if any(sharding.is_sharded(parameter) for parameter in parameters_of(layers[-1])):
            return ShardedLayout(model, model_group)
        why_no_micro = _why_no_micro(layers)
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
            return DataParallelLayout(model_group, why_no_micro=why_no_micro)
        return PlainLayout(model_group, why_no_micro=why_no_micro)


def _why_no_micro(layers: Sequence[Any]) -> str | None:
    """Return why whole models on several processes do not take their steps together, or None."""
    for layer in layers:
        if is_kind(layer, "postlocalsgdoptimizer"):
            return LOCAL.format(wrapper=type(layer).__name__)
    return None


def choose(model: nn.Module, optimizer: Any, model_group: Any = None) -> Layout:
    """Return how the weights lie.

    Args:
        model: As given to attach; of several, a `ModuleList` of them.
        optimizer: As given to attach.
        model_group: As given to attach.

    Raises:
        PluginLoadError: If an installed layout cannot be loaded.
    """
    hook = _layout_plugins(tuple(sys.path)).hook
    layout: Layout = hook.regrad_layout(model=model, optimizer=optimizer, model_group=model_group)
    return layout


def is_own(layout: Layout) -> bool:
    """Say whether a layout is one of the core's, and not of another distribution."""
    return type(layout).__module__ == __name__


@functools.lru_cache(maxsize=1)
def _layout_plugins(_: tuple[str, ...]) -> pluggy.PluginManager:
    """Return everything that offers layouts; found once, unless Python looks elsewhere then."""
    manager = pluggy.PluginManager("regrad")
    manager.add_hookspecs(LayoutSpec)
    # pluggy asks those first that were registered last.
    manager.register(OwnLayouts(), "regrad")
    group = registry.GROUPS["layout"]
    for name in registry.available(group):
        if registry.is_disabled(name):
            continue
        offered = registry.load(name, group)
        manager.register(offered, name)
        if not any(caller.name == LAYOUT_HOOK for caller in manager.get_hookcallers(offered) or ()):
            raise PluginLoadError(
                f"layout {name!r} must have a function {LAYOUT_HOOK!r} marked with "
                f"regrad.hookimpl, got {offered!r}"
            )
    return manager
