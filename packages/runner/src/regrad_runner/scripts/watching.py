"""What a script makes and calls: its optimizers, and the outermost modules of its forwards."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from regrad.module_hooks import Handle
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks


class OptimizerWatch:
    """Reports every torch optimizer of the process once: when it is made, or at its first step.

    The second is for those whose class does not call `Optimizer.__init__`, and for unpickled ones.

    Args:
        report: Called with the optimizer. Its groups may not be filled yet.
        before_step: Called with an optimizer and the arguments of its `step`, before it; may
            return other ones, as a hook of torch may.
        after_step: Called with an optimizer after its step.
    """

    def __init__(
        self,
        report: Callable[[Optimizer], None],
        before_step: Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any],
        after_step: Callable[[Optimizer], None],
    ) -> None:
        self._report = report
        self._before = before_step
        self._after = after_step
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._plain = Optimizer.__init__
        self._handles: list[Handle] = []

    def start(self) -> None:
        """Watch from now on."""
        plain = self._plain

        @functools.wraps(plain)
        def noted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            plain(optimizer, *args, **kwargs)
            self._note(optimizer)

        Optimizer.__init__ = noted  # type: ignore[method-assign, assignment]
        self._handles = [
            optimizer_hooks.register_optimizer_step_pre_hook(self._before_step),
            optimizer_hooks.register_optimizer_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        """Leave everything as it was before `start`."""
        Optimizer.__init__ = self._plain  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, optimizer: Optimizer) -> None:
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._report(optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._note(optimizer)
        return self._before(optimizer, args, kwargs)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)


class ForwardWatch:
    """Reports the training forwards of outermost modules, before they run, while it is on.

    A module is outermost if no other module's forward called it. A wrapper such as DDP or a
    compiled module is one: what it wraps is called inside. When off, it costs nothing per call.

    Args:
        report: Called with a module that is in training mode, while gradients are computed, and
            its inputs by position.
    """

    def __init__(self, report: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        self._report = report
        self._handles: list[Handle] = []
        self._depth = 0

    @property
    def is_on(self) -> bool:
        """Whether forwards are watched now."""
        return bool(self._handles)

    def start(self) -> None:
        """Watch from now on."""
        if self.is_on:
            return
        self._depth = 0
        self._handles = [
            global_hooks.register_module_forward_pre_hook(self._enter),
            global_hooks.register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Leave forwards alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth == 1 and module.training and torch.is_grad_enabled():
            self._report(module, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs, output
        self._depth = max(0, self._depth - 1)
