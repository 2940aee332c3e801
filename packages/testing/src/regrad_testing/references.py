"""Training by the author's reference: float64, no regrad, optimizers written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from regrad_testing.problem import Batch, Problem


@dataclass
class ReferenceStep:
    """What a `reference` is given: one stage of one step. Tensors are float64, and its own to keep.

    Attributes:
        stage: "weights", "criterion", "gradient", "moment" or "update".
        index: Optimizer steps before this one.
        optimizer: Name of its class, "SGD" or "AdamW".
        options: The correction's options.
        names: Names of the parameters.
        modules: The module that holds each.
        weights: The true weights.
        lrs: The learning rate of the next update, of each.
        states: The optimizer's state of each, keys as in torch ("momentum_buffer";
            "exp_avg", "exp_avg_sq", "step"); empty before the first step.
        gradients: In the stages "gradient", "moment" and "update".
        displacements: In the stage "update": what the optimizer's step adds to the weights,
            without decoupled weight decay. `weights` are those before it.
        logits: In the stage "criterion", shape [N, C]; a tuple of them where the model returns one.
        targets: In the stage "criterion", shape [N].
        memory: Empty at the beginning of a training, and kept from call to call.
    """

    stage: str
    index: int
    optimizer: str
    options: Any
    names: list[str]
    modules: list[nn.Module]
    weights: list[Tensor]
    lrs: list[float]
    states: list[dict[str, Any]]
    memory: dict[Any, Any]
    gradients: list[Tensor] = field(default_factory=list)
    displacements: list[Tensor] = field(default_factory=list)
    logits: Any = None
    targets: Tensor | None = None


Reference = Callable[[ReferenceStep], Any]


def _sgd(
    group: dict[str, Any], state: dict[str, Any], weight: Tensor, gradient: Tensor, first: Tensor
) -> Tensor:
    """Return the weight after torch's SGD; `first` goes into the buffer for the gradient."""
    decayed = first + group["weight_decay"] * weight
    old = state.get("momentum_buffer")
    state["momentum_buffer"] = (
        decayed if old is None else group["momentum"] * old + (1 - group["dampening"]) * decayed
    )
    moved: Tensor = weight - group["lr"] * state["momentum_buffer"]
    return moved


def _adamw(
    group: dict[str, Any], state: dict[str, Any], weight: Tensor, gradient: Tensor, first: Tensor
) -> Tensor:
    """Return the weight after torch's AdamW; `first` goes into the first moment."""
    beta1, beta2 = group["betas"]
    zero = torch.zeros_like(weight)
    state["step"] = state.get("step", 0) + 1
    state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * first
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * gradient**2
    mean = state["exp_avg"] / (1 - beta1 ** state["step"])
    root = torch.sqrt(state["exp_avg_sq"]) / math.sqrt(1 - beta2 ** state["step"])
    kept = weight - group["lr"] * group["weight_decay"] * weight
    moved: Tensor = kept - group["lr"] * mean / (root + group["eps"])
    return moved


UPDATES: dict[type[Optimizer], Callable[..., Tensor]] = {SGD: _sgd, AdamW: _adamw}


def can_follow(optimizer: Optimizer) -> bool:
    """Say whether the optimizer is written out here: torch's SGD or AdamW with plain options."""
    group = optimizer.param_groups[0]
    plain = not (group["maximize"] or group.get("nesterov") or group.get("amsgrad"))
    return type(optimizer) in UPDATES and plain


class ReferenceTraining:
    """Trains as the reference says.

    Args:
        problem: Model, batches, criterion.
        optimizer: The optimizer whose class and options are used; it is not stepped.
        reference: Called in every one of `stages`, once per step.
        stages: The correction's.
        options: The correction's.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer,
        reference: Reference,
        stages: Sequence[str],
        options: Any,
    ) -> None:
        self.problem = problem
        self.reference = reference
        self.stages = stages
        self.options = options
        self.model = problem.make_model()
        self.kind = type(optimizer)
        self.group = dict(optimizer.param_groups[0])
        self.base_rate = self.group["lr"]
        self.names = [name for name, _ in self.model.named_parameters()]
        modules = dict(self.model.named_modules())
        self.modules = [modules[name.rpartition(".")[0]] for name in self.names]
        self.weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.states: list[dict[str, Any]] = [{} for _ in self.names]
        self.memory: dict[Any, Any] = {}

    def run(self) -> list[dict[str, Tensor]]:
        """Return the weights after every step."""
        seen = []
        for index in range(self.problem.steps):
            self._step(index)
            pairs = zip(self.names, self.weights, strict=True)
            seen.append({name: weight.clone() for name, weight in pairs})
        return seen

    def _step(self, index: int) -> None:
        self.group["lr"] = self.base_rate * self.problem.rate(index)
        points = self._ask("weights", index) or self.weights
        gradients = self._gradients(index, points)
        gradients = self._ask("gradient", index, gradients=gradients) or gradients
        first = self._ask("moment", index, gradients=gradients) or gradients
        rows = zip(self.states, self.weights, gradients, first, strict=True)
        moved = [UPDATES[self.kind](self.group, *row) for row in rows]
        self.weights = self._corrected_update(index, moved, gradients)

    def _corrected_update(
        self, index: int, moved: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """Return the weights after an update that the reference may change."""
        decay = self.group["lr"] * self.group["weight_decay"] if self.kind is AdamW else 0.0
        kept = [(1 - decay) * weight for weight in self.weights]
        steps = [after - before for after, before in zip(moved, kept, strict=True)]
        changed = self._ask("update", index, gradients=gradients, displacements=steps)
        if changed is None:
            return moved
        return [before + step for before, step in zip(kept, changed, strict=True)]

    def _gradients(self, index: int, points: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the loss at `points`."""
        batch: Batch = self.problem.batch(index)
        leaves = [point.detach().clone().requires_grad_() for point in points]
        named = dict(zip(self.names, leaves, strict=True))
        logits = functional_call(self.model, named, (batch.inputs,))
        told = tree_map(lambda each: each.detach().clone(), logits)
        slope = self._ask("criterion", index, logits=told, targets=batch.targets)
        if slope is not None:
            slopes = [each * batch.weight for each in tree_leaves(slope)]
            return list(torch.autograd.grad(tree_leaves(logits), leaves, slopes))
        loss = type(self.problem).criterion(logits, batch.targets) * batch.weight
        return list(torch.autograd.grad(loss, leaves))

    def _ask(self, stage: str, index: int, **known: Any) -> Any:
        """Return what the reference says in a stage; None if the correction does not act."""
        if stage not in self.stages:
            return None
        lists = ("gradients", "displacements")
        own = {name: [tensor.clone() for tensor in known.pop(name, [])] for name in lists} | known
        step = ReferenceStep(
            stage=stage,
            index=index,
            optimizer=self.kind.__name__,
            options=self.options,
            names=self.names,
            modules=self.modules,
            weights=[weight.clone() for weight in self.weights],
            lrs=[self.group["lr"]] * len(self.names),
            states=[dict(state) for state in self.states],
            memory=self.memory,
            **own,
        )
        return self.reference(step)
