"""The training loops that people have: parts of a batch, closures, scalers, several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import regrad
import torch
from regrad import Correction
from regrad.sharding import is_sharded
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_testing.problem import Problem

MakeOptimizer = Callable[..., Optimizer]


class Training:
    """A model, its optimizer and, if there are corrections, the attachment; takes steps.

    Args:
        problem: Model, batches, criterion.
        make_optimizer: Called with the parameters.
        corrections: To attach; None trains without regrad at all.
        dtype: Of weights and inputs.
        wrap: Changes the model before the optimizer is made.
        parallel: Wraps the model, after that, for several processes.
        scale: Initial scale of a GradScaler; None for none.
        rows: Which rows of every batch this process sees.
        options: More keyword arguments of the optimizer.

    Attributes:
        model: The innermost model.
        outer: What the loop calls: `model`, or what `parallel` made of it.
        weights_after: Copies of the weights after each step.
    """

    def __init__(
        self,
        problem: Problem,
        make_optimizer: MakeOptimizer,
        corrections: Sequence[Correction] | None,
        *,
        dtype: torch.dtype = torch.float64,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        parallel: Callable[[nn.Module], nn.Module] | None = None,
        scale: float | None = None,
        rows: slice = slice(None),
        **options: Any,
    ) -> None:
        model = problem.make_model(dtype)
        self.problem = problem
        self.dtype = dtype
        self.rows = rows
        self.model = wrap(model) if wrap else model
        self.outer = parallel(self.model) if parallel else self.model
        parameters = ordered_parameters(self.model, options.pop("order", None))
        self.optimizer = make_optimizer(parameters, **options)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.criterion: Any = type(problem).criterion
        self.attachment: Any = None
        if corrections is not None:
            self.attach(corrections)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, enabled=scale is not None
        )
        self.weights_after: list[dict[str, Tensor]] = []

    def attach(self, corrections: Sequence[Correction]) -> None:
        """Attach corrections to a training that has none."""
        self.attachment = regrad.attach(self.outer, self.optimizer, corrections, self.criterion)
        self.criterion = self.attachment.criterion

    def run(self, indices: Iterable[int] | None = None, **how: Any) -> Training:
        """Take the steps `indices` (all of the problem's by default) and return self."""
        if indices is None:
            indices = range(self.problem.steps)
        for index in indices:
            self.step(index, **how)
            self.weights_after.append(self.weights())
        return self

    def step(self, index: int, *, closure: bool = False, **how: Any) -> None:
        """Take one step; `how` is that of `backward`."""
        self.set_rates(index)
        if closure:
            call: Any = functools.partial(self.backward, index, **how)
            self.optimizer.step(call)
            return
        self.backward(index, **how)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def set_rates(self, index: int) -> None:
        """Set the learning rate of each group for the step `index`."""
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=False):
            group["lr"] = base * self.problem.rate(index)

    def backward(
        self,
        index: int,
        *,
        parts: int = 1,
        overflow: bool = False,
        weight: float | None = None,
        backwards: bool = False,
        set_to_none: bool = True,
    ) -> Tensor:
        """Leave the gradient of one batch in `.grad`.

        Args:
            index: Which batch.
            parts: Micro-batches.
            overflow: Make the loss infinite.
            weight: Factor on the loss in place of the batch's own.
            backwards: Take the rows in the opposite order.
            set_to_none: How gradients are cleared before.

        Returns:
            The loss of the last part.
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)
        batch = self.problem.batch(index, self.dtype)
        inputs, targets = batch.inputs[self.rows], batch.targets[self.rows]
        if backwards:
            inputs, targets = inputs.flip(0), targets.flip(0)
        factor = (batch.weight if weight is None else weight) / parts
        loss = torch.zeros(())
        for part, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            loss = self.criterion(self.outer(part), wanted) * factor
            self.scaler.scale(loss * torch.inf if overflow else loss).backward()
        return loss

    @torch.no_grad()
    def evaluate(self, index: int) -> None:
        """Run the model on one batch in evaluation mode."""
        self.outer.eval()
        self.outer(self.problem.batch(index, self.dtype).inputs[self.rows])
        self.outer.train()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name in the innermost model."""
        return dict(self.model.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights that the model holds now, whole where they are shards."""
        return {
            name: whole(parameter.detach()).clone()
            for name, parameter in self.named_parameters().items()
        }

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the live gradients by name."""
        return {name: parameter.grad for name, parameter in self.named_parameters().items()}

    def correction_state(self) -> dict[str, Any]:
        """Return the corrections' state by their names."""
        if self.attachment is None:
            return {}
        return dict(self.attachment.state_dict()["corrections"])


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be a shard."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def ordered_parameters(model: nn.Module, order: str | None) -> list[Any]:
    """Return a model's parameters for an optimizer: as they are, "reversed", or in two "groups"."""
    parameters = list(model.parameters())
    if order == "reversed":
        return parameters[::-1]
    if order == "groups":
        return [{"params": parameters[1::2]}, {"params": parameters[::2]}]
    return parameters
