"""What ZeRO holds of the parameters: read and written as whole tensors, one at a time.

Everything in this file that reads a whole tensor is collective: all processes must call it for the
same parameters in the same order.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn


class Stage(ABC):
    """The parameters that an optimizer of ZeRO steps, in its own form.

    Args:
        optimizer: DeepSpeed's optimizer, `engine.optimizer`.

    Attributes:
        number: The stage, 1 to 3.
        groups: The parameters that are trained, by the optimizer's groups.
    """

    number: int
    groups: list[list[nn.Parameter]]

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def process_group(self) -> Any:
        """The processes that have the parameters between them."""
        return self.optimizer.dp_process_group

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters in the order of the groups."""
        flat: list[nn.Parameter] = []
        for group in self.groups:
            flat += group
        return flat

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole gradient in float32, averaged over processes and micro-batches."""
        # deepspeed takes seconds to import, and is there when an engine is.
        from deepspeed.utils import safe_get_full_grad  # noqa: PLC0415

        gradient: Tensor = safe_get_full_grad(parameter)
        return gradient.to(torch.float32)

    def true_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole weight in float32, from which the next step starts."""
        from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415 - see above

        weight: Tensor = safe_get_full_fp32_param(parameter)
        return weight

    @abstractmethod
    def skips_what_is_not_finite(self) -> bool:
        """Say whether DeepSpeed leaves out a step whose gradients are not finite."""

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the whole parameter."""

    @abstractmethod
    def set_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Write a whole gradient where the step will read it. Not collective."""

    @abstractmethod
    def forget_gradients(self) -> None:
        """Drop the gradients of a step that is left out, as ZeRO itself does. Not collective."""

    @abstractmethod
    def forward_weights(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the tensors, of this process, from which a forward pass takes a parameter."""

    @abstractmethod
    def set_forward_weights(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Write a whole weight into these tensors, and not where the step reads it."""

    @abstractmethod
    def shapes(self) -> contextlib.AbstractContextManager[None]:
        """Let parameters that are empty between uses show their shapes in the block."""


class WholeWeights(Stage):
    """Stages 1 and 2: every process has all weights, and a part of everything else."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.number = 2 if optimizer.partition_gradients else 1
        self.groups = [list(group) for group in optimizer.bit16_groups]

    def skips_what_is_not_finite(self) -> bool:
        """Say so where DeepSpeed looks for it: at all gradients, or at their norm."""
        zero = self.optimizer
        reads_norm = zero.compute_grad_norm and zero.dtype != torch.bfloat16
        return bool(zero.check_grad_overflow or reads_norm)

    def true_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return it without communication where the model is in float32: then it is a copy."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        return super().true_weight(parameter)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the parameter's own."""
        return parameter.shape

    def set_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Write the part that this process steps."""
        from deepspeed.utils import safe_set_full_grad  # noqa: PLC0415 - see above

        safe_set_full_grad(parameter, gradient)

    def forget_gradients(self) -> None:
        """Drop them, whole ones and those of the part that this process steps."""
        # See above.
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID  # noqa: PLC0415

        zero = self.optimizer
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None

    def forward_weights(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the parameter's values."""
        return [parameter.data]

    def set_forward_weights(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Write them."""
        parameter.data.copy_(weight)

    def shapes(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: they are there."""
        return contextlib.nullcontext()


class CutWeights(Stage):
    """Stage 3: every process has a part of each weight, and gathers it for its use."""

    number = 3

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.groups = [[] for _ in optimizer.optimizer.param_groups]
        for index, parameters in enumerate(optimizer.fp16_groups):
            self.groups[optimizer.sub_group_to_group_id[index]] += parameters

    def skips_what_is_not_finite(self) -> bool:
        """Say so: its norm tells it."""
        return True

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape that DeepSpeed notes."""
        cut: Any = parameter
        return torch.Size(cut.ds_shape)

    def set_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Write the part of this process: of the whole, DeepSpeed writes no part with padding."""
        from deepspeed.utils import safe_set_local_grad  # noqa: PLC0415 - see above

        safe_set_local_grad(parameter, self._own_part(parameter, gradient))

    def forget_gradients(self) -> None:
        """Drop those that this process keeps parts of."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.averaged_gradients = {}

    def _own_part(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return the part of a whole tensor that this process has, padded as DeepSpeed does."""
        size = parameter.ds_tensor.numel()
        rank = distributed.get_rank(self.process_group)
        flat = whole.reshape(-1)[rank * size : (rank + 1) * size]
        return nn.functional.pad(flat, (0, size - flat.numel()))

    def forward_weights(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this process's part, and the whole where DeepSpeed keeps a small one gathered."""
        cut: Any = parameter
        if parameter.shape == self.shape(parameter):
            return [cut.ds_tensor.data, parameter.data]
        return [cut.ds_tensor.data]

    def set_forward_weights(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Write the part, and the whole where it is there."""
        part, *whole = self.forward_weights(parameter)
        part.copy_(self._own_part(parameter, weight).view_as(part))
        for gathered in whole:
            gathered.copy_(weight)

    @contextlib.contextmanager
    def shapes(self) -> Iterator[None]:
        """Put in their places tensors of one element that is seen everywhere, not a number."""
        empty = [p for p in self.parameters() if p.shape != self.shape(p)]
        before = [parameter.data for parameter in empty]
        for parameter in empty:
            parameter.data = parameter.new_full((), torch.nan).expand(self.shape(parameter))
        try:
            yield
        finally:
            for parameter, data in zip(empty, before, strict=True):
                parameter.data = data
