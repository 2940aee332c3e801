"""An engine that steps one flat tensor, by an optimizer that is no torch optimizer."""

import contextlib
from dataclasses import replace

import pytest
import regrad
import torch
from regrad import layouts
from regrad.correction import Needs
from regrad.layouts import PlainLayout
from torch import nn

EVERYWHERE = ("plain", "flat-engine")


class FlatEngine(nn.Module):
    """Calls its module; steps a flat copy of the parameters and writes it back into them."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.optimizer = FlatOptimizer(list(module.parameters()))

    def forward(self, inputs):
        return self.module(inputs)

    def train(self, mode=True):
        self.module.train(mode)
        return self


class FlatOptimizer:
    """Steps the flat copy, unless the loss was not finite."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
        self.optimizer = torch.optim.SGD([self.flat], lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self):
        self.flat.grad = torch.cat([p.grad.flatten() for p in self.parameters])
        if self.flat.grad.isfinite().all():
            self.optimizer.step()
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, self.flat.split(sizes), strict=True):
            parameter.data.copy_(part.view_as(parameter))
            parameter.grad = None


class StandIns(torch.optim.Optimizer):
    """Holds the flat tensor's parts in the shapes of the parameters."""

    def __init__(self, engine):
        self.engine = engine
        self.own_step = None
        named = [(n, nn.Parameter(p.detach().clone())) for n, p in engine.module.named_parameters()]
        super().__init__([{"params": named, "lr": 0.1}], {})

    def pairs(self):
        return zip(self.param_groups[0]["params"], self.engine.optimizer.parameters, strict=True)

    @torch.no_grad()
    def step(self, closure=None):
        self.own_step()
        for stand_in, parameter in self.pairs():
            stand_in.copy_(parameter)
            stand_in.grad = None


class FlatLayout(PlainLayout):
    """Stands in for the engine."""

    name = "flat-engine"
    notes = ("the engine is flat",)

    def __init__(self, engine):
        super().__init__()
        self.model = engine.module
        self.optimizer = StandIns(engine)
        self.own_step = self
        self.has_shapes = False
        self.kept = []

    @contextlib.contextmanager
    def shapes(self):
        self.has_shapes = True
        yield
        self.has_shapes = False

    def bind(self):
        own = self.optimizer.engine.optimizer
        self.optimizer.own_step = own.step
        own.step = self.begin
        return Binding(own)

    def begin(self):
        is_finite = True
        for stand_in, parameter in self.optimizer.pairs():
            stand_in.grad = parameter.grad
            is_finite = is_finite and bool(parameter.grad.isfinite().all())
        self.optimizer.found_inf = 0.0 if is_finite else 1.0
        self.optimizer.step()

    def move(self, open_window):
        was_moved = open_window()
        for stand_in, parameter in self.optimizer.pairs():
            parameter.data.copy_(stand_in.detach())
        return was_moved


class Binding:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def remove(self):
        vars(self.optimizer).pop("step", None)


@pytest.fixture
def make_engine(toys, monkeypatch):
    """Return an engine and its layout, which attach finds."""

    def make():
        engine = FlatEngine(toys.Net())
        layout = FlatLayout(engine)
        monkeypatch.setattr(layouts, "choose", lambda *_: layout)
        return engine, layout

    return make


def train(model, optimizer, toys, steps):
    for index in range(steps):
        torch.manual_seed(index)
        toys.loss_of(model).backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None


class ByName(regrad.Correction):
    """Halve the gradients of weights alone, and note what it saw."""

    name = "by-name"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE)

    def setup(self, attachment):
        layout = attachment.engine.layout
        self.had_shapes = getattr(layout, "has_shapes", None)
        self.seen = attachment.model

    def correct_gradients(self, step):
        for name, gradient in step.named_gradients():
            if name.endswith("weight"):
                gradient.mul_(0.5)


@pytest.fixture
def corrections(toys):
    """Return new corrections, which declare the engine's layout."""

    def make():
        shift = toys.Shift(amount=0.1)
        shift.needs = replace(shift.needs, layouts=EVERYWHERE)
        return [shift, ByName()]

    return make


def test_an_engines_own_step_is_corrected_as_a_torch_optimizers(toys, make_engine, corrections):
    engine, layout = make_engine()
    attachment = regrad.attach(engine, engine.optimizer, corrections())
    assert attachment.optimizer is layout.optimizer
    assert attachment.model is engine.module
    train(engine, engine.optimizer, toys, 4)
    receipt = attachment.receipt()
    alone = toys.Net()
    plain = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    attachment.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "choose", lambda *_: PlainLayout())
        regrad.attach(alone, plain, corrections())
        train(alone, plain, toys, 4)
    for seen, wanted in zip(engine.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-15)
    assert receipt["steps_applied"] == 4
    assert "the engine is flat" in receipt["notes"]


def test_shapes_are_shown_at_setup_and_names_are_the_models(toys, make_engine, corrections):
    engine, _ = make_engine()
    made = corrections()
    attachment = regrad.attach(engine, engine.optimizer, made)
    assert made[1].had_shapes
    assert made[1].seen is engine.module
    names = [name for name, _ in engine.module.named_parameters()]
    assert attachment.engine.step().names == names


def test_the_state_lies_in_the_optimizer_that_the_engine_saves(toys, make_engine, corrections):
    engine, _ = make_engine()
    regrad.attach(engine, engine.optimizer, corrections())
    train(engine, engine.optimizer, toys, 2)
    saved = engine.optimizer.optimizer.state_dict()
    assert saved["regrad"]["receipt"]["steps_applied"] == 2
    other, _ = make_engine()
    attachment = regrad.attach(other, other.optimizer, corrections())
    other.optimizer.optimizer.load_state_dict(saved)
    assert attachment.metrics()["steps_applied"] == 2


def test_a_step_that_the_engine_leaves_out_is_skipped(toys, make_engine, corrections):
    engine, _ = make_engine()
    attachment = regrad.attach(engine, engine.optimizer, corrections())
    (toys.loss_of(engine) * torch.inf).backward()
    engine.optimizer.step()
    train(engine, engine.optimizer, toys, 1)
    metrics = attachment.metrics()
    assert (metrics["steps_applied"], metrics["steps_skipped"]) == (1, 1)


def test_detach_gives_the_engine_its_step_back(toys, make_engine, corrections):
    engine, _ = make_engine()
    attachment = regrad.attach(engine, engine.optimizer, corrections())
    assert "step" in vars(engine.optimizer)
    with pytest.raises(regrad.RegradError, match="already attached"):
        regrad.attach(engine, engine.optimizer, corrections())
    attachment.detach()
    assert "step" not in vars(engine.optimizer)
