"""Optimizers that evaluate or move elsewhere, by fakes of the libraries' shape, and those that never step."""

import warnings

import pytest
import regrad
import torch
from regrad import RegradError, RegradWarning, engine


class Ascends(torch.optim.Optimizer):
    """davda54's SAM: two steps by name, or one with a closure; steps a base optimizer."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        held = [p for group in self.param_groups for p in group["params"]]
        scale = self.defaults["rho"] / torch.stack([p.grad.norm() for p in held]).norm()
        for parameter in held:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=scale.item())
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for parameter, state in self.state.items():
            parameter.copy_(state["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class Unknown(torch.optim.SGD):
    """Evaluates the model inside its step at weights of its own, under a name that nobody knows."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1.01)
        with torch.enable_grad():
            closure()
        return super().step()


def closure_of(toys, model, optimizer, seed=0):
    def closure():
        optimizer.zero_grad()
        loss = toys.loss_of(model, seed=seed)
        loss.backward()
        return loss

    return closure


def sam(model):
    return Ascends(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("with_closure", [True, False])
def test_gradients_at_the_perturbed_weights_are_corrected_as_by_hand(toys, with_closure):
    weights = []
    for by_hand in (True, False):
        model = toys.Net()
        optimizer = sam(model)
        attachment = regrad.attach(model, optimizer, [] if by_hand else [toys.Scale()])
        for seed in range(4):
            closure = closure_of(toys, model, optimizer, seed)
            closure()
            if with_closure and not by_hand:
                optimizer.step(closure)
            else:
                optimizer.first_step(zero_grad=True)
                closure()
                for parameter in model.parameters() if by_hand else ():
                    parameter.grad.mul_(0.5)
                optimizer.second_step()
        assert attachment.metrics()["steps_applied"] == 4
        weights.append(toys.weights_of(model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-12)


def test_an_optimizer_that_ascends_is_refused_with_a_window(toys):
    model = toys.Net()
    with pytest.raises(RegradError, match="evaluates the model a second time at weights of its"):
        regrad.attach(model, sam(model), [toys.Shift()])


def test_an_unknown_optimizer_that_evaluates_at_other_weights_is_refused_when_it_does(toys):
    model = toys.Net()
    optimizer = Unknown(model.parameters(), lr=0.1)
    regrad.attach(model, optimizer, [toys.Shift()])
    with pytest.raises(RegradError, match=r"Unknown evaluates the model inside its step .*'shift'"):
        optimizer.step(closure_of(toys, model, optimizer))


def test_forwards_without_a_step_are_warned_about_once(toys):
    model = toys.Net()
    regrad.attach(model, toys.sgd(model), [toys.Scale()])
    with pytest.warns(RegradWarning, match="50 training forwards .* without a step") as caught:
        for _ in range(3 * engine.FORWARDS_WITHOUT_STEP):
            toys.loss_of(model).backward()
    assert len(caught) == 1


def test_an_accumulation_over_many_batches_is_not_warned_about_after_its_first_step(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    for step in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if step == 0 else "error")
            for _ in range(64):
                toys.loss_of(model).backward()
            optimizer.step()
