"""The record of a model's first training forward: which modules ran, in which order, on which shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regrad.hooks import Hook


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        name: The module's name in the model.
        inputs: Shapes of the tensors that went in.
        outputs: Shapes of the tensors that came out.
        makes_output: Whether its output is the model's output, or that output's `logits`.
    """

    name: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    makes_output: bool


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


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
        self._seen: list[tuple[str, Any, list[Tensor]]] = []
        self.handles = [m.register_forward_hook(Hook(m, self._keep)) for m in self._names]

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._names[module]:
            self._seen.append((self._names[module], _shapes(tensors_in(inputs)), list(tensors_in(output))))
            return
        if module.training:
            logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            final = {id(t) for t in tensors_in(output if logits is None else logits)}
            self.calls = tuple(Call(n, i, _shapes(o), bool(final & {*map(id, o)})) for n, i, o in self._seen)
            for handle in self.handles:
                handle.remove()
        self._seen.clear()  # keep no tensor alive


def _shapes(tensors: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors)
