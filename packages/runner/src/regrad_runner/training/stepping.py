"""The backward pass and the step of a run, one after the other: by accelerate, or by an engine.

In between, loss and gradients are looked at, and gradients are clipped. accelerate would let
DeepSpeed step inside `accelerator.backward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from regrad import Attachment
from regrad.sharding import local, total_norm
from torch import Tensor, nn

SMALL = 1e-6  # what torch adds to a norm before it divides by it


def is_engine(accelerator: Accelerator) -> bool:
    """Say whether models that an accelerator prepares become engines of DeepSpeed."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


class AcceleratedSteps:
    """Steps of an optimizer that accelerate prepared.

    Args:
        accelerator: Of the run.
        model: As the accelerator prepared it.
        optimizer: As the accelerator prepared it.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what has the gradients of a step, by name."""
        model: nn.Module = self._accelerator.unwrap_model(self._model)
        return model.named_parameters()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        self._accelerator.backward(loss)

    def clip(self, max_norm: float) -> None:
        """Clip the gradients of a step to a norm."""
        self._accelerator.clip_grad_norm_(self._model.parameters(), max_norm)

    def step(self) -> None:
        """Take a step, with corrections; nothing between the micro-batches of one."""
        self._optimizer.step()

    def forget_gradients(self) -> None:
        """End a step, taken or left out; nothing between the micro-batches of one."""
        self._optimizer.zero_grad()


class EngineSteps:
    """Steps of an engine of DeepSpeed, whose gradients stand-ins of the parameters have.

    Args:
        accelerator: Of the run.
        engine: As the accelerator prepared it.
        attachment: Its optimizer is that of regrad-deepspeed, `regrad_deepspeed.StandIns`.
    """

    def __init__(self, accelerator: Accelerator, engine: Any, attachment: Attachment) -> None:
        self._accelerator = accelerator
        self._engine = engine
        self._attachment = attachment
        self._stand_ins: Any = attachment.optimizer

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what has the gradients of a step, by the names in the model."""
        return self._attachment.engine.step().named_parameters()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; with the last one of a step, show them."""
        is_last = self._accelerator.sync_gradients
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._engine.backward(loss)
        if is_last:
            self._stand_ins.take_gradients()

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Clip the gradients of a step to a norm, as torch does, before the corrections."""
        named = self.named_parameters()
        gradients = [stand_in.grad for _, stand_in in named if stand_in.grad is not None]
        factor = (max_norm / (total_norm(gradients) + SMALL)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(factor)
        self._stand_ins.give_gradients()

    def step(self) -> None:
        """Take a step, with corrections; nothing between the micro-batches of one."""
        if self._accelerator.sync_gradients:
            self._engine.step()

    def forget_gradients(self) -> None:
        """End a step, taken or left out; nothing between the micro-batches of one."""
        if self._accelerator.sync_gradients:
            self._stand_ins.forget_gradients()
