"""The record of the first training forward: which submodule was called when, with which shapes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrad.module_hooks import Handle, add_hook


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        name: The module's name in the model.
        inputs: Shapes of the tensors that went in; nested tensors, which have none, are left out.
        outputs: Shapes of the tensors that came out.
        makes_output: Whether its output is the model's output, or that output's `logits`.
    """

    name: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    makes_output: bool


class ForwardRecord:
    """Records the first training forward after its creation, then removes its hooks.

    For several modules that are attached together, each one's forward is recorded, in the order of
    the calls; the output of the last one called is the model's. No tensor is kept alive: the
    forward needs no more memory than without.

    Args:
        model: The innermost module. Gets a forward hook per submodule until then.
        roots: The modules of it that the loop calls; by default itself.

    Attributes:
        calls: One `Call` per finished submodule call, in that order; empty until a forward ran.
    """

    def __init__(self, model: nn.Module, roots: Sequence[nn.Module] = ()) -> None:
        self.calls: tuple[Call, ...] = ()
        self._names = {module: name for name, module in model.named_modules()}
        self._seen: list[tuple[str, Any, Any, list[Callable[[], Any]]]] = []
        self._handles_of: dict[nn.Module, list[Handle]] = {}
        hooked: set[nn.Module] = set()
        for root in roots or (model,):
            modules = [module for module in root.modules() if module not in hooked]
            hooked.update(modules)
            self._handles_of[root] = [
                add_hook(module, module.register_forward_hook, self._keep) for module in modules
            ]
            self._handles_of[root].append(
                add_hook(root, root.register_forward_pre_hook, self._begin)
            )

    @property
    def handles(self) -> list[Handle]:
        """What removes the hooks that are there."""
        there: list[Handle] = []
        for handles in self._handles_of.values():
            there += handles
        return there

    def _begin(self, *_: Any) -> None:
        """Forget what an interrupted forward left."""
        self._seen.clear()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        is_root = module in self._handles_of
        name = self._names[module]
        if name:
            leaves = tree_leaves(output)
            self._seen.append(
                (name, _shapes(tree_leaves(inputs)), _shapes(leaves), [*map(_reference, leaves)])
            )
        if not is_root:
            return
        if module.training:
            self._finish(module, output)
        self._seen.clear()

    def _finish(self, root: nn.Module, output: Any) -> None:
        """Turn what was seen into calls; the record of this root is complete."""
        is_mapping = isinstance(output, Mapping)
        logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
        leaves_of_output = tree_leaves(output if logits is None else logits)
        final = {id(leaf) for leaf in leaves_of_output if leaf is not None}
        earlier = [replace(call, makes_output=False) for call in self.calls]
        calls = [
            Call(name, inputs, outputs, any(id(leaf()) in final for leaf in leaves))
            for name, inputs, outputs, leaves in self._seen
        ]
        self.calls = (*earlier, *calls)
        for handle in self._handles_of.pop(root):
            handle.remove()


def _reference(leaf: Any) -> Callable[[], Any]:
    """Return a call that returns a leaf: None once it is gone, if it can be referred to weakly."""
    try:
        return weakref.ref(leaf)
    except TypeError:  # a number, or an object with slots
        return lambda: leaf


def _shapes(leaves: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_nested
    )
