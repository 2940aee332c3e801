"""Random interleavings of all that a script may do, against a loop by hand that knows the rules.

The loop by hand has no hooks: it keeps the true weights, the weights that the next forward sees,
and what each was when the window opened, and it moves, restores and trains them itself.
"""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import regrad
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from regrad.optimizer_state import take_out
from torch import nn

RATE, MOMENTUM, OTHER_RATE, MAX_RATIO, WEIGHT_FLOOR = 0.05, 0.9, 0.03, 0.05, 1e-3
CORRECTIONS = {
    "none": [],
    "agc": [f"agc:max_ratio={MAX_RATIO},head=none"],
    "xgrad": ["xgrad"],
}
BATCHES = st.integers(0, 3)


class Network(nn.Module):
    """Two layers, a gain that joins the optimizer late, and a shift that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(2))
        self.shift = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.double()
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            for parameter in layer.parameters():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(0.5 * values)

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs))) * self.gain + self.shift


def loss_of(network, index):
    generator = torch.Generator().manual_seed(100 + index)
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (6,), generator=generator)
    return nn.functional.cross_entropy(network(inputs), labels)


class ByHand:
    """The rules, without hooks.

    Attributes:
        live: The weights that a forward pass sees, by name.
        window: What was moved: by name the true weights, or None while it is closed.
        before: Of what the last own step moved and nobody wrote since, the weights before it.
        ahead: Where weights were moved that were restored before their step.
        followed: What was asked for at the last opening: of that the steps are known.
    """

    def __init__(self, correction: str) -> None:
        self.correction = correction
        self.network = Network()
        self.live = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        self.trained = ["first.weight", "first.bias", "second.weight", "second.bias", "shift"]
        self.frozen = {"shift"}
        self.momentum: dict[str, torch.Tensor] = {}
        self.attach()

    def attach(self) -> None:
        self.is_attached = True
        self.window: dict[str, torch.Tensor] | None = None
        self.before: dict[str, torch.Tensor] = {}
        self.ahead: dict[str, torch.Tensor] = {}
        self.followed: set[str] = set()
        self.loaded: list[dict[str, torch.Tensor]] | None = None
        self.written: set[str] = set()
        self.paused = False
        self.other_steps = 0

    def detach(self) -> None:
        self.close()
        self.is_attached = False

    @property
    def true(self) -> dict[str, torch.Tensor]:
        """What a state_dict holds."""
        kept = {n: v for n, v in (self.window or {}).items() if n not in self.written}
        return self.live | kept

    def close(self, *, before_step: bool = False) -> None:
        if self.window is not None:
            if not before_step:
                self.ahead = {n: self.live[n] for n in self.window.keys() - self.written}
            self.live = self.true
            if self.written & self.window.keys():
                self.paused = True
        self.window = None
        self.written = set()

    def write(self, name: str, value: torch.Tensor) -> None:
        self.live[name] = value.clone()
        self.written.add(name)
        self.before.pop(name, None)
        self.ahead.pop(name, None)

    def before_training_forward(self) -> None:
        if not (self.is_attached and self.correction == "xgrad"):
            return
        if self.window is not None and self.written & self.window.keys():
            self.close()
        if self.window is None and not self.paused:
            self.take_loaded()
            self.followed = {n for n in self.trained if n not in self.frozen}
            going_on = {n: 2 * self.live[n] - before for n, before in self.before.items()}
            places = going_on | self.ahead
            moved = [n for n in self.trained if n in places and n in self.followed]
            self.window = {n: self.live[n] for n in moved}
            self.written = set()
            self.before = {}
            self.ahead = {}
            for name in moved:
                self.live[name] = places[name]

    def window_state(self) -> list[dict[str, torch.Tensor]]:
        """Return what a checkpoint holds: weights before, places ahead, and the weights beside."""
        if self.loaded is not None:
            return self.loaded
        moved = self.window.keys() - self.written if self.window is not None else set()
        return [dict(self.before), self.ahead | {n: self.live[n] for n in moved}, dict(self.true)]

    def load_window(self, state: list[dict[str, torch.Tensor]]) -> None:
        self.before = {}
        self.ahead = {}
        self.followed = set()
        self.loaded = state

    def take_loaded(self) -> None:
        """Take what was loaded, of the weights that are those beside which it was saved."""
        if self.loaded is None:
            return
        before, ahead, beside = self.loaded
        self.loaded = None
        same = {n for n, value in beside.items() if torch.equal(value, self.live[n])}
        self.before = {n: value for n, value in before.items() if n in same}
        self.ahead = {n: value for n, value in ahead.items() if n in same}
        self.followed = set(self.before) | set(self.ahead)

    def forward_backward(self, index: int) -> None:
        self.before_training_forward()
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.live[name])
        loss_of(self.network, index).backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.network.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}

    def corrected(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if self.correction != "agc" or not self.is_attached:
            return gradient
        weight = self.live[name]
        rows = weight.dim() > 1
        units = list(zip(gradient, weight, strict=True)) if rows else [(gradient, weight)]
        clipped = []
        for unit, of_weight in units:
            limit = MAX_RATIO * max(of_weight.norm().item(), WEIGHT_FLOOR)
            factor = min(1.0, limit / max(unit.norm().item(), 1e-300))
            clipped.append(unit * factor)
        return torch.stack(clipped) if rows else clipped[0]

    def step(self) -> None:
        if self.is_attached:
            self.take_loaded()
        self.close(before_step=True)
        self.ahead = {}
        self.before = {}
        gradients = self.gradients()
        for name in self.trained:
            if name not in gradients or name in self.frozen:
                continue
            gradient = self.corrected(name, gradients[name])
            parameter = dict(self.network.named_parameters())[name]
            parameter.grad = gradient.clone()
            if name in self.followed:
                self.before[name] = self.live[name]
            before = self.momentum.get(name)
            self.momentum[name] = gradient if before is None else MOMENTUM * before + gradient
            self.live[name] = self.live[name] - RATE * self.momentum[name]
        self.after_step()

    def after_step(self) -> None:
        self.paused = False
        self.other_steps = 0

    def other_step(self) -> None:
        if self.is_attached and self.correction == "xgrad":
            self.close()
            self.other_steps += 1
            if self.other_steps > 1:
                self.paused = True
        for name, gradient in self.gradients().items():
            self.write(name, self.live[name] - OTHER_RATE * gradient)
        self.written = set()


class Interleavings(RuleBasedStateMachine):
    """Every rule does the same to a model with regrad and to the loop by hand."""

    @initialize(correction=st.sampled_from(sorted(CORRECTIONS)))
    def begin(self, correction):
        self.corrections = CORRECTIONS[correction]
        self.hand = ByHand(correction)
        self.model = Network()
        names = dict(self.model.named_parameters())
        self.own = torch.optim.SGD(
            [names[name] for name in self.hand.trained], lr=RATE, momentum=MOMENTUM
        )
        self.other = torch.optim.SGD(self.model.parameters(), lr=OTHER_RATE)
        self.attachment = regrad.attach(self.model, self.own, self.corrections)
        self.saved_model = None
        self.saved_optimizer = None

    def quietly(self, do, *arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", regrad.RegradWarning)
            return do(*arguments)

    @rule(index=BATCHES)
    def train_on(self, index):
        self.model.train()
        self.quietly(lambda: loss_of(self.model, index).backward())
        self.hand.forward_backward(index)

    @rule(index=BATCHES)
    def train_forward_alone(self, index):
        self.model.train()
        self.quietly(loss_of, self.model, index)
        self.hand.before_training_forward()

    @rule(index=BATCHES)
    def evaluate(self, index):
        self.model.eval()
        self.quietly(loss_of, self.model, index)
        self.model.train()
        if self.hand.is_attached:
            self.hand.close()

    @rule(index=BATCHES)
    def train_forward_without_gradients(self, index):
        with torch.no_grad():
            loss_of(self.model, index)

    @rule()
    def clear(self):
        self.own.zero_grad()
        self.model.zero_grad()
        self.hand.network.zero_grad()

    @rule()
    def step(self):
        self.quietly(self.own.step)
        self.hand.step()

    @rule()
    def skipped_step(self):
        # As a fused optimizer under a GradScaler that met an infinite gradient. torch's own fused
        # SGD is not used: it starts from momentum that it never initialised where its first step
        # is skipped, and fails where a parameter joins later.
        self.own.found_inf = torch.ones(())
        with mock.patch("torch.optim.sgd.sgd"):
            self.quietly(self.own.step)
        del self.own.found_inf
        if self.hand.is_attached:
            self.hand.close()
            self.hand.after_step()

    @rule()
    def other_step(self):
        self.quietly(self.other.step)
        self.hand.other_step()

    @rule(name=st.sampled_from(["first.weight", "second.bias"]), through=st.booleans())
    def write_by_hand(self, name, through):
        parameter = dict(self.model.named_parameters())[name]
        if through:
            parameter.data.mul_(0.9)
        else:
            with torch.no_grad():
                parameter.mul_(0.9)
        self.hand.write(name, self.hand.live[name] * 0.9)

    @rule()
    def save_model(self):
        self.saved_model = {n: v.clone() for n, v in self.model.state_dict().items()}

    @precondition(lambda self: self.saved_model is not None)
    @rule()
    def load_model(self):
        self.quietly(self.model.load_state_dict, self.saved_model)
        if self.hand.is_attached:
            self.hand.close()
        for name, value in self.saved_model.items():
            self.hand.write(name, value)
        self.hand.written = set()

    @precondition(lambda self: self.saved_model is not None)
    @rule()
    def load_part(self):
        prefix = "first."
        part = {
            name.removeprefix(prefix): value
            for name, value in self.saved_model.items()
            if name.startswith(prefix)
        }
        self.model.first.load_state_dict(part)
        for name, value in part.items():
            self.hand.write(prefix + name, value)

    @rule()
    def save_optimizer(self):
        self.saved_optimizer = copy.deepcopy(self.own.state_dict())
        self.saved_momentum = dict(self.hand.momentum)
        self.saved_window = self.hand.window_state() if self.hand.is_attached else None
        self.saved_groups = len(self.own.param_groups)

    @precondition(lambda self: self.saved_optimizer is not None)
    @rule()
    def load_optimizer(self):
        if self.saved_groups != len(self.own.param_groups):
            return
        saved = copy.deepcopy(self.saved_optimizer)
        if not self.hand.is_attached:
            # The next attachment would start from it, where the loop by hand starts anew.
            take_out(saved["param_groups"])
        self.quietly(self.own.load_state_dict, saved)
        if self.hand.is_attached:
            self.hand.close()
            if self.saved_window is not None:
                self.hand.load_window(self.saved_window)
        self.hand.momentum = dict(self.saved_momentum)

    @precondition(lambda self: "gain" not in self.hand.trained)
    @rule()
    def add_a_group(self):
        self.own.add_param_group({"params": [self.model.gain]})
        self.hand.trained.append("gain")

    @precondition(lambda self: self.hand.frozen)
    @rule()
    def unfreeze(self):
        self.model.shift.requires_grad_()
        self.hand.network.shift.requires_grad_()
        self.hand.frozen = set()

    @rule()
    def copy_the_model(self):
        twin = copy.deepcopy(self.model)
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(parameter.detach(), self.hand.live[name])
        loss_of(twin.train(), 0).backward()
        assert not any(module._forward_pre_hooks for module in twin.modules())

    @precondition(lambda self: self.hand.is_attached)
    @rule()
    def detach(self):
        self.quietly(self.attachment.detach)
        self.hand.detach()

    @precondition(lambda self: not self.hand.is_attached)
    @rule()
    def attach(self):
        self.attachment = regrad.attach(self.model, self.own, self.corrections)
        self.hand.attach()

    @rule()
    def a_forward_raises(self):
        self.model.train()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            self.quietly(self.model, torch.ones(2, 7, dtype=torch.float64))
        self.hand.before_training_forward()

    @precondition(lambda self: self.hand.is_attached)
    @rule(index=BATCHES)
    def an_exception_leaves_the_context(self, index):
        def interrupted():
            with self.attachment:
                loss_of(self.model, index)
                raise KeyboardInterrupt

        self.model.train()
        with pytest.raises(KeyboardInterrupt):
            self.quietly(interrupted)
        self.hand.before_training_forward()
        self.hand.detach()

    def teardown(self):
        if hasattr(self, "attachment"):
            self.quietly(self.attachment.detach)

    @invariant()
    def the_weights_are_those_of_the_loop_by_hand(self):
        for name, parameter in self.model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), self.hand.live[name], rtol=1e-10, atol=1e-12, msg=name
            )
        for name, value in self.model.state_dict().items():
            torch.testing.assert_close(
                value, self.hand.true[name], rtol=1e-10, atol=1e-12, msg=f"saved {name}"
            )

    @invariant()
    def the_gradients_are_those_of_the_loop_by_hand(self):
        by_hand = self.hand.gradients()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                assert name not in by_hand
            else:
                torch.testing.assert_close(
                    parameter.grad, by_hand[name], rtol=1e-10, atol=1e-12, msg=f"grad {name}"
                )


COMMON = {
    "stateful_step_count": 40,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


class TestHundred(Interleavings.TestCase):
    """The same hundred sequences in every run."""

    settings = settings(max_examples=100, derandomize=True, **COMMON)


@pytest.mark.slow
@pytest.mark.timeout(3000)
class TestTwoThousand(Interleavings.TestCase):
    """Two thousand sequences, others in every run."""

    settings = settings(
        max_examples=2000, phases=[Phase.reuse, Phase.generate, Phase.shrink], **COMMON
    )
