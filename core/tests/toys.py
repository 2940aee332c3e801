"""Corrections whose numbers are known by hand, and small models to put them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from regrad import Correction
from regrad.correction import Needs, Options
from regrad.sharding import local, locals_of, row_norms
from torch import nn

EVERYWHERE = ("plain", "ddp", "fsdp2")


def away(weight: torch.Tensor, amount: float) -> torch.Tensor:
    """Return `amount` with the sign of each weight."""
    return weight.sign() * amount


def moved(model: nn.Module, amount: float) -> nn.Module:
    """Move the weights of a model as `Shift` does, for good; return the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(away(parameter, amount))
    return model


class Shift(Correction):
    """Move every weight by `amount` away from zero for the forward pass: the window's simplest user.

    A move of all weights by one constant would be invisible behind a softmax or a normalisation.
    """

    name = "shift"
    needs = Needs(stages=("weights",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        amount: float = 0.5

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = 0

    def predict_weights(self, step):
        self.calls += 1
        return [away(local(p.detach()), self.options.amount) for p in step.parameters]


class Push(Shift):
    """Move the weights further at every step, and only from the second step on."""

    name = "push"

    def predict_weights(self, step):
        self.calls += 1
        amount = self.options.amount * step.index
        return [away(local(p.detach()), amount) for p in step.parameters] if amount else None


class Scale(Correction):
    """Multiply every gradient by `factor`."""

    name = "scale"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE, closures=True)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        factor: float = 0.5

        def __post_init__(self) -> None:
            if not self.factor > 0:
                raise ValueError(f"factor must be positive, got {self.factor!r}")

    def correct_gradients(self, step):
        for gradient in step.gradients:
            if gradient is not None:
                gradient.mul_(self.options.factor)


class Add(Correction):
    """Add `amount` to every gradient: does not commute with `Scale`."""

    name = "add"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE, closures=True)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        amount: float = 1.0

    def correct_gradients(self, step):
        for gradient in step.gradients:
            if gradient is not None:
                gradient.add_(self.options.amount)


class Spy(Correction):
    """Keep what each hook of a step saw, by parameter name; change nothing."""

    name = "spy"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE, closures=True, sparse=True)

    def __init__(self, **options):
        super().__init__(**options)
        self.gradients: list[dict] = []
        self.weights: list[dict] = []
        self.indices: list[int] = []
        self.learned = 0

    def correct_gradients(self, step):
        pairs = zip(step.names, step.gradients, strict=True)
        self.gradients.append({name: None if g is None else g.clone() for name, g in pairs})
        self.weights.append(
            {n: p.detach().clone() for n, p in zip(step.names, step.parameters, strict=True)}
        )
        self.indices.append(step.index)

    def after_step(self, step):
        self.learned += 1

    def idle_reason(self):
        return None


class Boost(Correction):
    """Add `amount` to the moment that SGD or Adam will read."""

    name = "boost"
    needs = Needs(stages=("moment",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        amount: float = 1.0

    def correct_moments(self, step):
        for parameter in step.parameters:
            state = step.optimizer.state.get(parameter, {})
            for key in ("momentum_buffer", "exp_avg"):
                if state.get(key) is not None:
                    state[key].add_(self.options.amount)


class Stretch(Correction):
    """Multiply the optimizer's steps by `factor` where they go down the gradient, divide them elsewhere.

    By rows, whose norms are exact on shards only through `row_norms`.
    """

    name = "stretch"
    needs = Needs(stages=("update",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        factor: float = 2.0

    def correct_update(self, step):
        for displacement, gradient in zip(step.displacements, step.gradients, strict=True):
            if displacement is None:
                continue
            part = local(displacement)
            down = part * local(gradient) < 0
            part.mul_(torch.where(down, self.options.factor, 1 / self.options.factor))
            self.change(part, displacement)

    def change(self, part, displacement):
        part.div_(1 + row_norms(displacement).to(part.dtype))


class Lengthen(Stretch):
    """Do so element by element."""

    name = "lengthen"

    def change(self, part, displacement):
        part.mul_(1.5)


class Louder(Correction):
    """Multiply the loss by `factor` in training."""

    name = "louder"
    needs = Needs(stages=("criterion",), layouts=EVERYWHERE, closures=True, sparse=True)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        factor: float = 3.0

    def wrap_criterion(self, criterion):
        return lambda *arguments, **options: self.options.factor * criterion(*arguments, **options)


class Tally(Correction):
    """Count the steps of every parameter, by name: state that grows with the model."""

    name = "tally"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE)

    def __init__(self, **options):
        super().__init__(**options)
        self.seen: dict[str, torch.Tensor] = {}

    def correct_gradients(self, step):
        for name in step.names:
            self.seen.setdefault(name, torch.zeros((), dtype=torch.int64)).add_(1)

    def state_dict(self):
        return {name: count.clone() for name, count in self.seen.items()}

    def load_state_dict(self, state):
        self.seen = {name: count.clone() for name, count in state.items()}

    def metrics(self):
        return {"names": float(len(self.seen))}

    def idle_reason(self):
        return None


class Listen(Correction):
    """Keep the shapes that come out of the submodules called `target`."""

    name = "listen"
    needs = Needs(stages=("hidden",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        target: str = "head"

    def __init__(self, **options):
        super().__init__(**options)
        self.heard: list[tuple[int, ...]] = []

    def setup(self, attachment):
        module = attachment.model.get_submodule(self.options.target)
        attachment.hook_forward(
            module, lambda module, inputs, output: self.heard.append(tuple(output.shape))
        )

    def idle_reason(self):
        return None


class UnitRows(Correction):
    """Divide every gradient by the norms of its rows: exact on shards only through `row_norms`."""

    name = "unit-rows"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE)

    def correct_gradients(self, step):
        for gradient in step.gradients:
            if gradient is not None:
                locals_of([gradient])[0].div_(row_norms(gradient).to(gradient.dtype) + 1e-3)


class Net(nn.Module):
    """Body, tanh, group normalisation, head: [N, 3] to [N, 2]. Every weight but the head's mean matters."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.GroupNorm(2, 4, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)
        fill(self, seed)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


class Messy(nn.Module):
    """Batch normalisation and dropout; returns its loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        fill(self, 0)

    def forward(self, x, labels=None):
        logits = self.head(self.drop(self.norm(self.body(x))))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        fill(self, 0)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def fill(model: nn.Module, seed: int) -> None:
    """Give a model weights from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
            )


def batch(size: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Return inputs [size, 3] and labels [size]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(0, 2, (size,), generator=generator)


def loss_of(
    model: nn.Module, size: int = 8, *, seed: int = 0, criterion=nn.functional.cross_entropy
):
    """Return the loss of one batch."""
    inputs, labels = batch(size, seed=seed, dtype=next(model.parameters()).dtype)
    return criterion(model(inputs), labels)


def train_step(
    model: nn.Module, optimizer, *, seed: int = 0, criterion=nn.functional.cross_entropy
) -> None:
    """Run one ordinary training step."""
    optimizer.zero_grad()
    loss_of(model, seed=seed, criterion=criterion).backward()
    optimizer.step()


def sgd(model: nn.Module, **options):
    """Return SGD with momentum on every parameter of `model`."""
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def weights_of(model: nn.Module) -> dict:
    """Return copies of the weights and buffers that the module holds now, without any hook."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}
