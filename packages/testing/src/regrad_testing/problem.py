"""The small problems on which suites train: a model, a criterion, and always the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Batch:
    """One global batch.

    Attributes:
        inputs: Shape [N, *].
        targets: Classes, shape [N].
        weight: Factor on its loss, so that gradients grow and shrink from step to step.
    """

    inputs: Tensor
    targets: Tensor
    weight: float


class Problem:
    """Tell vectors into three classes with a model of two layers and group normalisation.

    Subclass it where a correction needs something else: override `model` and
    `inputs`, and set the attributes. Models must not mix the samples of a batch (no
    batch normalisation) and must draw nothing in training (no dropout): then four
    parts of a batch, and two processes, are the batch to rounding.

    Attributes:
        classes: Number of classes.
        batch_size: Rows of a batch; a multiple of 8.
        steps: Optimizer steps of a training.
        criterion: The loss, a mean over the rows.
        weights: Factors on the loss, in turn from step to step.
        rates: Factors on the learning rate, in turn from step to step.
    """

    classes = 3
    batch_size = 32
    steps = 8
    criterion: Callable[..., Tensor] = nn.CrossEntropyLoss()
    weights: tuple[float, ...] = (1.0, 1.0, 0.1)
    rates: tuple[float, ...] = (1.0, 0.7, 1.3, 0.4)

    def model(self) -> nn.Module:
        """Return the model, inputs [N, *] to logits [N, C]; its weights are filled afterwards.

        It may return a tuple of logits, if the criterion takes one.
        """
        # sizes that two processes cannot share evenly
        return nn.Sequential(
            nn.Linear(6, 9), nn.GroupNorm(3, 9), nn.Tanh(), nn.Linear(9, self.classes)
        )

    def inputs(self, size: int, generator: torch.Generator) -> Tensor:
        """Return inputs, shape [size, *], float64, drawn from `generator`."""
        return torch.randn(size, 6, generator=generator, dtype=torch.float64)

    def make_model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model with the same weights every time, whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
                )
        return model.to(dtype)

    def batch(self, index: int, dtype: torch.dtype = torch.float64) -> Batch:
        """Return the batch of step `index`: the same whatever was drawn before."""
        generator = torch.Generator().manual_seed(1000 + index)
        inputs = self.inputs(self.batch_size, generator)
        targets = torch.randint(self.classes, (self.batch_size,), generator=generator)
        return Batch(inputs.to(dtype), targets, self.weights[index % len(self.weights)])

    def rate(self, index: int) -> float:
        """Return the factor on the learning rate in step `index`."""
        return self.rates[index % len(self.rates)]


class StagedImages(Problem):
    """Tell small images apart with a convolutional model: a stem, two stages, pooling, a head."""

    def model(self) -> nn.Module:
        """Return the model, images [N, 2, 8, 8] to logits [N, C]."""
        return Staged(self.classes)

    def inputs(self, size: int, generator: torch.Generator) -> Tensor:
        """Return images, shape [size, 2, 8, 8]."""
        return torch.randn(size, 2, 8, 8, generator=generator, dtype=torch.float64)


class SumOverExits(nn.Module):
    """The sum of the losses of a model's outputs, which a plain loop calls on a tuple of them.

    Args:
        exit_criterion: The loss of one output. Corrections of models with several exits find it
            by this name.
    """

    def __init__(self, exit_criterion: nn.Module) -> None:
        super().__init__()
        self.exit_criterion = exit_criterion

    def forward(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the sum of the outputs' losses."""
        total: Tensor = self.exit_criterion(outputs[0], targets)
        for output in outputs[1:]:
            total = total + self.exit_criterion(output, targets)
        return total


class SeveralExits(Problem):
    """Tell vectors into three classes three times: after each of three layers, by a head each."""

    criterion: Callable[..., Tensor] = SumOverExits(nn.CrossEntropyLoss())

    def model(self) -> nn.Module:
        """Return the model, inputs [N, 6] to a tuple of three logits [N, C]."""
        return WithExits(self.classes)


class WithExits(nn.Module):
    """Three layers in a chain, and a head on each."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(6, 9)
        self.layer2 = nn.Linear(9, 9)
        self.layer3 = nn.Linear(9, 9)
        self.head1 = nn.Linear(9, classes)
        self.head2 = nn.Linear(9, classes)
        self.head3 = nn.Linear(9, classes)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the three exits, in the order of their depth."""
        first = torch.tanh(self.layer1(inputs))
        second = torch.tanh(self.layer2(first))
        third = torch.tanh(self.layer3(second))
        return self.head1(first), self.head2(second), self.head3(third)


class Block(nn.Module):
    """Two convolutions with group normalisation and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.norm2(self.conv2(torch.tanh(self.norm1(self.conv1(x)))))
        return torch.tanh(y + self.shortcut(x))


class Staged(nn.Module):
    """A residual network in small: stem, `layer1`, `layer2`, pooling, head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.layer1 = Block(4, 4, 1)
        self.layer2 = Block(4, 6, 2)
        self.head = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        features: Tensor = self.layer2(self.layer1(torch.tanh(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class WithRareParameters(nn.Module):
    """A model with a parameter that never gets a gradient, and one that gets some on request.

    Args:
        net: The model.

    Attributes:
        late_is_used: Whether the second takes part in the forward.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        like = next(net.parameters())
        self.net = net
        self.late_is_used = False
        self.never = nn.Parameter(torch.full((2, 3), 0.5, dtype=like.dtype))
        self.late = nn.Parameter(torch.full((2, 1), 0.25, dtype=like.dtype))

    def forward(self, inputs: Tensor) -> Any:
        """Return the logits, of every exit if there are several."""
        logits = self.net(inputs)
        if self.late_is_used:
            factor = self.late.square().sum().exp()
            return tree_map(lambda each: each * factor, logits)
        return logits


class WithSparseTable(nn.Module):
    """A model whose inputs are shifted by rows of an embedding with sparse gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        like = next(net.parameters())
        self.net = net
        self.table = nn.Embedding(5, 2, sparse=True, dtype=like.dtype)
        with torch.no_grad():
            self.table.weight.fill_(0.25)

    def forward(self, inputs: Tensor) -> Any:
        """Return the logits."""
        rows = torch.arange(len(inputs)) % 3
        shift: Tensor = self.table(rows).sum(1)
        return self.net(inputs + shift.reshape(-1, *[1] * (inputs.dim() - 1)))
