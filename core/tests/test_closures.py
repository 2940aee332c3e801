"""Optimizers that compute the gradients inside `step(closure)`."""

import pytest
import regrad
import torch
from regrad import RegradError

LBFGS_OPTIONS = {"lr": 0.1, "max_iter": 5, "tolerance_grad": 0, "tolerance_change": 0}


def closure_of(toys, model, optimizer, seed=0):
    def closure():
        optimizer.zero_grad()
        loss = toys.loss_of(model, seed=seed)
        loss.backward()
        return loss

    return closure


@pytest.fixture(params=["positional", "keyword"])
def step_with(request):
    if request.param == "positional":
        return lambda optimizer, closure: optimizer.step(closure)
    return lambda optimizer, closure: optimizer.step(closure=closure)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_forward_and_backward_inside_the_closure_give_the_numbers_of_the_plain_loop(
    toys, same_bits, name, step_with
):
    results, losses = [], []
    for inside in (False, True):
        model = toys.Net()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05)
        shift, spy = toys.Push(amount=0.1), toys.Spy()
        regrad.attach(model, optimizer, [shift, toys.Scale(), spy])
        for seed in range(4):
            closure = closure_of(toys, model, optimizer, seed)
            if inside:
                losses.append(step_with(optimizer, closure))
            else:
                losses.append(closure())
                optimizer.step()
        results.append(
            (toys.weights_of(model), spy.gradients, spy.weights, spy.indices, shift.calls)
        )
    assert same_bits(*results)
    assert same_bits(losses[:4], losses[4:])
    assert results[1][3] == [0, 1, 2, 3]


def test_a_closure_of_none_is_no_closure(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    regrad.attach(model, optimizer, [spy])
    toys.loss_of(model).backward()
    optimizer.step(None)
    toys.loss_of(model).backward()
    optimizer.step(closure=None)
    assert spy.indices == [0, 1]


def test_a_closure_that_raises_leaves_the_window_to_the_next_step(toys, same_bits):
    model = toys.Net()
    optimizer = toys.sgd(model)
    shift, spy = toys.Shift(), toys.Spy()
    regrad.attach(model, optimizer, [shift, spy])
    true = toys.weights_of(model)

    def breaks():
        toys.loss_of(model)
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        optimizer.step(breaks)
    assert spy.indices == []
    optimizer.step(closure_of(toys, model, optimizer))
    assert same_bits(spy.weights[0], true)
    assert shift.calls == 1


def test_lbfgs_is_refused_with_a_window(toys):
    class Bears(toys.Shift):
        needs = regrad.correction.Needs(stages=("weights",), closures=True)

    model = toys.Net()
    optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS_OPTIONS)
    with pytest.raises(
        RegradError, match=r"'shift' must see one closure call.*LBFGS makes several"
    ):
        regrad.attach(model, optimizer, [Bears()])


def test_lbfgs_is_refused_where_a_correction_does_not_bear_several_closures(toys):
    model = toys.Net()
    optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS_OPTIONS)
    with pytest.raises(
        RegradError, match=r"'tally' must see one closure call.*LBFGS makes several"
    ):
        regrad.attach(model, optimizer, [toys.Scale(), toys.Tally()])


def test_five_closures_of_lbfgs_are_corrected_one_by_one_and_count_as_one_step(toys):
    gradients = []
    for factor in (None, 0.5):
        model = toys.Net()
        optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS_OPTIONS)
        spy = toys.Spy()
        scale = [] if factor is None else [toys.Scale(factor=factor)]
        attachment = regrad.attach(model, optimizer, [*scale, spy])
        optimizer.step(closure_of(toys, model, optimizer))
        gradients.append(spy.gradients)
        assert spy.indices == [0] * 5
        assert spy.learned == 1
        assert attachment.metrics()["steps_applied"] == 1
    for name, gradient in gradients[0][0].items():
        torch.testing.assert_close(gradients[1][0][name], gradient * 0.5, rtol=0, atol=0)


def test_lbfgs_with_the_loss_halved_by_a_correction_steps_as_with_the_loss_halved_by_hand(toys):
    results = []
    for by_hand in (False, True):
        model = toys.Net()
        optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS_OPTIONS)
        regrad.attach(model, optimizer, [] if by_hand else [toys.Scale(factor=0.5)])

        def closure(model=model, optimizer=optimizer, factor=0.5 if by_hand else 1.0):
            optimizer.zero_grad()
            loss = toys.loss_of(model) * factor
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        results.append(toys.weights_of(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-12)


def test_another_optimizer_that_calls_its_closure_twice_is_stopped_at_the_second_call(toys):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            return super().step(closure)

    model = toys.Net()
    optimizer = Twice(model.parameters(), lr=0.1)
    regrad.attach(model, optimizer, [toys.Shift()])
    with pytest.raises(RegradError, match="shift must see one closure call per step, got 2"):
        optimizer.step(closure_of(toys, model, optimizer))
