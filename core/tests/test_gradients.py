"""Gradients that are frozen, missing, zero, sparse or not finite."""

import pytest
import regrad
import torch
from regrad import RegradError
from torch import nn


def test_frozen_and_missing_gradients_are_left_alone(toys, same_bits):
    model = toys.Net()
    model.body.requires_grad_(False)
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    attachment = regrad.attach(model, optimizer, [toys.Shift(), toys.Scale(), spy])
    frozen = toys.weights_of(model.body)
    loss = toys.loss_of(model)
    loss.backward()
    assert same_bits(toys.weights_of(model.body), frozen)
    model.head.bias.grad = None
    optimizer.step()
    assert same_bits(toys.weights_of(model.body), frozen)
    assert set(spy.gradients[0]) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert spy.gradients[0]["head.bias"] is None
    assert attachment.metrics()["scale/gradient/share_touched"] == 1


def test_a_step_in_which_no_parameter_has_a_gradient_is_no_error(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    attachment = regrad.attach(model, optimizer, [toys.Scale(), toys.Boost(), spy])
    toys.loss_of(model)
    optimizer.step()
    assert set(spy.gradients[0].values()) == {None}
    assert attachment.metrics()["steps_applied"] == 1


def test_zero_gradients_stay_zero_and_are_no_effect(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    (toys.loss_of(model) * 0).backward()
    optimizer.step()
    metrics = attachment.metrics()
    assert metrics["scale/gradient/share_touched"] == 0
    assert metrics["scale/gradient/relative_change"] == 0
    assert metrics["scale/gradient/non_finite"] == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_are_counted(toys, value):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    toys.loss_of(model).backward()
    model.head.bias.grad[0] = value
    optimizer.step()
    assert attachment.metrics()["scale/gradient/non_finite"] == 1


def sparse_model():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer


def test_a_sparse_gradient_is_refused_where_a_correction_has_no_rule_for_it(toys):
    model, optimizer = sparse_model()
    regrad.attach(model, optimizer, [toys.Spy(), toys.Scale()])
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RegradError, match=r"scale.*sparse gradients, got .*0\.weight"):
        optimizer.step()


def test_a_sparse_gradient_passes_a_correction_that_has_a_rule(toys):
    model, optimizer = sparse_model()
    spy = toys.Spy()
    regrad.attach(model, optimizer, [spy])
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert spy.gradients[0]["0.weight"].is_sparse
