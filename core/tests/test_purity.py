"""Attaching, detaching and an empty list leave everything as it was, bit for bit."""

import contextlib
import random

import pytest
import regrad
import torch
from regrad import RegradError


def run_steps(toys, model, optimizer, steps):
    for seed in range(steps):
        toys.train_step(model, optimizer, seed=seed)
    return toys.weights_of(model), optimizer.state_dict(), torch.get_rng_state()


@pytest.fixture
def chain(toys):
    return lambda: [toys.Shift(), toys.Scale(), toys.Boost(), toys.Listen(), toys.Louder()]


def test_attach_and_detach_without_a_step_change_no_bit(toys, same_bits, hooks_on, chain):
    model = toys.Net()
    optimizer = toys.sgd(model)
    run_steps(toys, model, optimizer, 2)

    def everything():
        return (
            toys.weights_of(model),
            optimizer.state_dict(),
            hooks_on(model, optimizer),
            torch.get_rng_state(),
        )

    before, python_state = everything(), random.getstate()
    attachment = regrad.attach(model, optimizer, chain(), torch.nn.CrossEntropyLoss())
    assert hooks_on(model, optimizer) != before[2]
    attachment.detach()
    assert same_bits(everything(), before)
    assert random.getstate() == python_state


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_an_empty_list_changes_no_bit_over_many_steps(toys, same_bits, name):
    results = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = toys.Messy()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        attachment = regrad.attach(model, optimizer, []) if attached else None
        results.append(run_steps(toys, model, optimizer, 30))
    assert attachment.metrics()["steps_applied"] == 30
    assert same_bits(results[0], results[1])


def test_training_goes_on_after_detach_as_if_never_attached(toys, same_bits, chain):
    results = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = toys.Net()
        optimizer = toys.sgd(model)
        if attached:
            regrad.attach(model, optimizer, chain(), torch.nn.CrossEntropyLoss()).detach()
        results.append(run_steps(toys, model, optimizer, 5))
    assert same_bits(results[0], results[1])


def test_detach_inside_the_window_restores_the_weights_and_removes_every_hook(
    toys, same_bits, hooks_on, chain
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    true, hooks = toys.weights_of(model), hooks_on(model, optimizer)
    attachment = regrad.attach(model, optimizer, chain(), torch.nn.CrossEntropyLoss())
    toys.loss_of(model)
    assert not same_bits(toys.weights_of(model), true)
    attachment.detach()
    assert same_bits(toys.weights_of(model), true)
    assert hooks_on(model, optimizer) == hooks


def test_hooks_that_others_set_survive_detach_in_their_order(toys, hooks_on, chain):
    model = toys.Net()
    optimizer = toys.sgd(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    hooks = hooks_on(model, optimizer)
    attachment = regrad.attach(model, optimizer, chain(), torch.nn.CrossEntropyLoss())
    toys.train_step(model, optimizer, criterion=attachment.criterion)
    attachment.detach()
    assert hooks_on(model, optimizer) == hooks
    assert calls == ["before", "step"]


def test_the_context_manager_restores_and_detaches_on_an_exception(toys, same_bits, hooks_on):
    model = toys.Net()
    optimizer = toys.sgd(model)
    true, hooks = toys.weights_of(model), hooks_on(model, optimizer)
    with (
        pytest.raises(ZeroDivisionError),
        regrad.attach(model, optimizer, [toys.Shift()]) as attachment,
    ):
        toys.loss_of(model)
        _ = 1 / 0
    assert attachment.is_detached
    assert same_bits(toys.weights_of(model), true)
    assert hooks_on(model, optimizer) == hooks


def test_a_refused_attach_leaves_nothing_behind(toys, same_bits, hooks_on):
    class Refuses(toys.Scale):
        name = "refuses"

        def setup(self, attachment):
            raise RegradError("refused, as asked")

    model = toys.Net()
    optimizer = toys.sgd(model)
    before = toys.weights_of(model), hooks_on(model, optimizer)
    earlier = toys.Listen()
    with pytest.raises(RegradError, match="refused, as asked"):
        regrad.attach(model, optimizer, [earlier, Refuses()])
    assert same_bits((toys.weights_of(model), hooks_on(model, optimizer)), before)
    assert earlier.attachment is None
    regrad.attach(model, optimizer, [earlier])


def test_a_criterion_that_a_correction_refuses_leaves_nothing_behind(toys, hooks_on):
    class Picky(toys.Louder):
        def wrap_criterion(self, criterion):
            raise TypeError("criterion must be another")

    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)
    with pytest.raises(TypeError, match="must be another"):
        regrad.attach(model, optimizer, [toys.Listen(), Picky()], torch.nn.CrossEntropyLoss())
    assert hooks_on(model, optimizer) == before
    regrad.attach(model, optimizer, []).detach()


def test_a_setup_that_draws_random_numbers_leaves_the_global_generator_as_it_was(toys):
    class Draws(toys.Scale):
        def setup(self, attachment):
            torch.rand(3)

    model = toys.Net()
    state = torch.get_rng_state()
    with contextlib.suppress(RegradError):
        regrad.attach(model, toys.sgd(model), [Draws()])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_detach_does_not_free_the_next_attachment(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    correction = toys.Scale()
    first = regrad.attach(model, optimizer, [correction])
    first.detach()
    second = regrad.attach(model, optimizer, [correction])
    first.detach()
    with pytest.raises(RegradError, match="already attached"):
        regrad.attach(model, optimizer, [])
    assert correction.attachment is second
