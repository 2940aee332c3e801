"""Serves a model whose own forward is never called, through the parts that are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from regrad.module_hooks import ModuleHandle, add_hook


class Parts:
    """Reports the forwards of the outermost called descendants of some roots.

    A LightningModule, a `ModuleList`, or a container of encoder and decoder is not called itself.
    At first every descendant that holds parameters of the optimizer is watched; those that were
    called by themselves within a step are kept, the hooks of the others are taken away.

    Args:
        before: Called with a part before its outermost forward.
        after: Called with a part, its inputs and its output after it.
    """

    def __init__(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self._before = before
        self._after = after
        self._handles: dict[nn.Module, list[ModuleHandle]] = {}
        self._called: set[nn.Module] = set()
        self._depth = 0

    @property
    def is_watching(self) -> bool:
        """Whether any part has hooks."""
        return bool(self._handles)

    def watch(self, roots: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        """Put hooks on every descendant of the roots that holds one of the parameters."""
        trained = set(parameters)
        for root in roots:
            for module in root.modules():
                is_new = module is not root and module not in self._handles
                if is_new and not trained.isdisjoint(module.parameters()):
                    self._watch_part(module)

    def _watch_part(self, module: nn.Module) -> None:
        """Put hooks before and after the forward of one module."""
        before = module.register_forward_pre_hook
        after = module.register_forward_hook
        self._handles[module] = [
            add_hook(module, before, self._enter, prepend=True),
            add_hook(module, after, self._leave, always_call=True),
        ]

    def end_step(self) -> None:
        """Keep the hooks of the parts that were called by themselves, if there were any."""
        self._depth = 0
        if not self._called:
            return
        inner = [module for module in self._handles if module not in self._called]
        for module in inner:
            self._remove(module)
        self._called.clear()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if self._depth == 0:
            self._called.add(module)
            self._before(module)
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._after(module, inputs, output)

    def _remove(self, module: nn.Module) -> None:
        for handle in self._handles.pop(module):
            handle.remove()

    def remove(self) -> None:
        """Take every hook away."""
        for module in list(self._handles):
            self._remove(module)
