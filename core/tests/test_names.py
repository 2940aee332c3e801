"""The names by which corrections keep state: stable, different, and following a parameter."""

import pytest
import regrad
import torch
from torch import nn


class Remember(regrad.Correction):
    """Add to each gradient what it was at the first step: state by name, of the parameter's shape."""

    name = "remember"
    needs = regrad.correction.Needs(stages=("gradient",))

    def __init__(self, **options):
        super().__init__(**options)
        self.first = {}

    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            if gradient is not None:
                self.first.setdefault(name, gradient.clone())
                gradient.add_(self.first[name])

    def state_dict(self):
        return {"first": {name: tensor.clone() for name, tensor in self.first.items()}}

    def load_state_dict(self, state):
        self.first = {name: tensor.clone() for name, tensor in state["first"].items()}


@pytest.fixture
def outside(toys):
    """Return a model, two parameters outside of it of which the first is frozen, and their optimizer."""
    model = toys.Net()
    shift = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [{"params": [shift, scale]}, {"params": model.parameters()}], lr=0.1
    )
    return model, shift, scale, optimizer


def names_of(attachment):
    return attachment.engine.step().names


def test_parameters_outside_the_model_are_named_by_group_and_place_whenever_they_thaw(outside):
    model, shift, _, optimizer = outside
    attachment = regrad.attach(model, optimizer, [Remember()])
    assert names_of(attachment)[:1] == ["unnamed.0.1"]
    shift.requires_grad_()
    assert names_of(attachment)[:2] == ["unnamed.0.0", "unnamed.0.1"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert names_of(attachment)[-1] == "unnamed.2.0"


def test_a_parameter_outside_the_model_has_the_same_name_after_a_resume(outside):
    model, shift, _, optimizer = outside
    before = regrad.attach(model, optimizer, [Remember()])
    kept = names_of(before)
    before.detach()
    shift.requires_grad_()
    assert set(kept) < set(names_of(regrad.attach(model, optimizer, [Remember()])))


def test_a_replaced_head_takes_the_name_and_the_old_one_keeps_its_state_under_another(toys):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    remember = Remember()
    attachment = regrad.attach(model, optimizer, [remember])
    toys.train_step(model, optimizer)
    old = remember.first["1.weight"].clone()
    model[1] = nn.Linear(4, 5).double()
    optimizer.add_param_group({"params": model[1].parameters()})
    toys.train_step(model, optimizer, seed=1)
    assert names_of(attachment) == [
        *("0.weight", "0.bias", "unnamed.0.2", "unnamed.0.3", "1.weight", "1.bias")
    ]
    assert torch.equal(remember.first["unnamed.0.2"], old)
    assert remember.first["1.weight"].shape == (5, 4)


@pytest.mark.parametrize("correction", ["xgrad", "agc", "clip-norm", "centralization"])
def test_a_head_of_another_size_trains_on_as_without_regrad_where_nothing_is_to_correct(
    toys, correction
):
    if correction not in regrad.available():
        pytest.skip(f"needs the plugin with {correction}")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.01)
    regrad.attach(model, optimizer, [correction])
    for seed in range(3):
        toys.train_step(model, optimizer, seed=seed)
    model[1] = nn.Linear(4, 5).double()
    optimizer.add_param_group({"params": model[1].parameters()})
    for seed in range(3):
        toys.train_step(model, optimizer, seed=seed)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_empty_first_group_is_no_obstacle(toys):
    model = toys.Net()
    optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    attachment = regrad.attach(model, optimizer, [toys.Shift(), toys.Scale()])
    toys.train_step(model, optimizer)
    assert attachment.metrics()["steps_applied"] == 1
