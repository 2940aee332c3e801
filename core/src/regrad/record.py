"""The record of the first training forward: which submodule was called when, with which shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrad.module_hooks import add_hook


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
    """Records the first training forward after it is made, then takes its hooks away.

    Args:
        model: The innermost module. Gets a forward hook per submodule until then.

    Attributes:
        calls: One `Call` per finished submodule call, in that order; empty until the forward ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: tuple[Call, ...] = ()
        self._names = {module: name for name, module in model.named_modules()}
        self._seen: list[tuple[str, Any, list[Any]]] = []
        self.handles = [
            add_hook(module, module.register_forward_hook, self._keep) for module in self._names
        ]
        self.handles.append(add_hook(model, model.register_forward_pre_hook, self._begin))

    def _begin(self, *_: Any) -> None:
        """Forget what an interrupted forward left."""
        self._seen.clear()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._names[module]
        if name:
            self._seen.append((name, _shapes(tree_leaves(inputs)), tree_leaves(output)))
            return
        if module.training:
            self._finish(output)
        self._seen.clear()  # keep no tensor alive

    def _finish(self, output: Any) -> None:
        """Turn what was seen into calls; the record is complete."""
        is_mapping = isinstance(output, Mapping)
        logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
        final = {id(leaf) for leaf in tree_leaves(output if logits is None else logits)}
        self.calls = tuple(
            Call(name, inputs, _shapes(outputs), any(id(leaf) in final for leaf in outputs))
            for name, inputs, outputs in self._seen
        )
        for handle in self.handles:
            handle.remove()


def _shapes(leaves: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_nested
    )
