"""The criterion that a loop calls: corrected in training, the original otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regrad.engine import Engine


class SwitchingCriterion:
    """Calls the corrected criterion while the attached model is in training mode, else the original.

    Args:
        engine: Says whether the model trains, and which steps are measured.
        original: The user's criterion.
        corrected: What the correction made of it; None after detach.
    """

    def __init__(self, engine: Engine, original: Any, corrected: Callable[..., Tensor] | None) -> None:
        self._engine, self.original, self.corrected = engine, original, corrected

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        if self.corrected is None or not self._engine.model.training:
            return self.original(*arguments, **options)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._measure(arguments, options)
        return self.corrected(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def _measure(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Compare the logit gradients of both criteria."""
        engine = self._engine
        owner = engine.callers["wrap_criterion"][0][0]
        if not arguments or not engine.meter.due(owner, engine.applied):
            return
        gradients = []
        for criterion in (self.original, self.corrected):
            logits = arguments[0].detach().requires_grad_()
            gradients += torch.autograd.grad(criterion(logits, *arguments[1:], **options).sum(), logits)  # type: ignore[misc]
        engine.meter.observe(owner.name, "criterion", gradients[:1], gradients[1:], ["logits"])
