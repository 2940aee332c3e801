"""Models whose own forward is never called are served through the parts that are."""

import pytest
import regrad
import torch
from regrad import RegradWarning
from torch import nn


class Halves(nn.Module):
    """Two parts that the loop calls one after the other; its own forward is never called."""

    def __init__(self, toys):
        super().__init__()
        net = toys.Net()
        self.encoder = nn.Sequential(net.body, nn.Tanh())
        self.decoder = nn.Sequential(net.head)

    def logits(self, inputs):
        return self.decoder(self.encoder(inputs))


class Whole(Halves):
    """The same, called as a whole."""

    def forward(self, inputs):
        return self.logits(inputs)


def train(toys, logits_of, optimizer, steps=4):
    for seed in range(steps):
        inputs, labels = toys.batch(seed=seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(inputs), labels).backward()
        optimizer.step()


def expected(toys):
    """What a model that is called as a whole ends with."""
    model = Whole(toys)
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Push(amount=0.1), toys.Scale()])
    train(toys, model, optimizer)
    return toys.weights_of(model)


def test_a_root_that_is_not_called_trains_as_one_that_is(toys, same_bits):
    model = Halves(toys)
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Push(amount=0.1), toys.Scale()])
    train(toys, model.logits, optimizer)
    assert same_bits(toys.weights_of(model), expected(toys))
    assert attachment.metrics()["push/weights/trigger_rate"] > 0


def test_several_modules_are_attached_as_a_list(toys, same_bits):
    model = Halves(toys)
    optimizer = toys.sgd(model)
    corrections = [toys.Push(amount=0.1), toys.Scale()]
    attachment = regrad.attach([model.encoder, model.decoder], optimizer, corrections)
    train(toys, model.logits, optimizer)
    assert same_bits(toys.weights_of(model), expected(toys))
    assert attachment.engine.step().names == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"]


def test_a_module_list_looks_ahead_from_the_first_step(toys):
    model = Halves(toys)
    parts = nn.ModuleList([model.encoder, model.decoder])
    optimizer = toys.sgd(parts)
    shift = toys.Shift()
    regrad.attach(parts, optimizer, [shift])
    train(toys, model.logits, optimizer, steps=1)
    assert shift.calls == 1


def test_state_dicts_of_roots_and_listed_parts_hold_the_true_weights_inside_the_window(
    toys, same_bits
):
    for listed in (False, True):
        model = Halves(toys)
        optimizer = toys.sgd(model)
        given = [model.encoder, model.decoder] if listed else model
        regrad.attach(given, optimizer, [toys.Push(amount=0.1)])
        train(toys, model.logits, optimizer, steps=2)
        true = toys.weights_of(model)
        model.logits(toys.batch()[0])
        assert not same_bits(toys.weights_of(model), true)
        if listed:
            parts = {"encoder": model.encoder, "decoder": model.decoder}
            found = {
                f"{name}.{key}": value
                for name, part in parts.items()
                for key, value in part.state_dict().items()
            }
        else:
            found = dict(model.state_dict())
        assert same_bits(found, true)


def test_an_evaluation_of_one_part_restores_all(toys, same_bits):
    model = Halves(toys)
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Push(amount=0.1)])
    train(toys, model.logits, optimizer, steps=2)
    true = toys.weights_of(model)
    model.logits(toys.batch()[0])
    model.eval()
    model.decoder(model.encoder(toys.batch()[0]))
    assert same_bits(toys.weights_of(model), true)


def test_a_frozen_part_in_evaluation_mode_does_not_end_the_window(toys, same_bits):
    model = Halves(toys)
    model.teacher = toys.Net().requires_grad_(False).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    regrad.attach(model, optimizer, [toys.Push(amount=0.1)])
    train(toys, model.logits, optimizer, steps=2)
    true = toys.weights_of(model)
    model.logits(toys.batch()[0])
    moved = toys.weights_of(model)
    model.teacher(toys.batch()[0])
    assert same_bits(toys.weights_of(model), moved)
    assert not same_bits(moved, true)


def test_a_submodule_in_evaluation_mode_inside_a_called_part_does_not_end_the_window(toys):
    model = Halves(toys)
    model.encoder[0].eval()  # as a frozen batch normalisation is
    optimizer = toys.sgd(model)
    push = toys.Push(amount=0.1)
    regrad.attach(model, optimizer, [push])
    train(toys, model.logits, optimizer, steps=4)
    assert push.calls == 4  # once per step


def test_hooks_go_to_the_outermost_called_parts_alone(toys):
    model = Halves(toys)
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Push(amount=0.1)])
    train(toys, model.logits, optimizer, steps=2)
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooked == ["", "encoder", "decoder"]
    attachment.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_raises_leaves_the_next_one_outermost(toys, same_bits):
    model = Halves(toys)
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Push(amount=0.1), toys.Scale()])
    train(toys, model.logits, optimizer, steps=2)
    true = toys.weights_of(model)
    with pytest.raises(RuntimeError):
        model.encoder(torch.ones(2, 7, dtype=torch.float64))
    model.eval()
    model.logits(toys.batch()[0])
    assert same_bits(toys.weights_of(model), true)
    model.train()
    model.logits(toys.batch()[0])
    assert not same_bits(toys.weights_of(model), true)


def test_an_empty_list_of_modules_is_refused(toys):
    model = toys.Net()
    with pytest.raises(TypeError, match="got an empty list"):
        regrad.attach([], toys.sgd(model), [toys.Scale()])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        regrad.attach([model, "encoder"], toys.sgd(model), [toys.Scale()])


def test_training_forwards_without_a_step_are_warned_about_once(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    for _ in range(49):
        toys.loss_of(model).backward()
    with pytest.warns(RegradWarning, match=r"50 training forwards .* without a step") as said:
        for _ in range(60):
            toys.loss_of(model).backward()
    assert len(said) == 1


def test_an_accumulation_over_many_micro_batches_is_not_warned_about_again(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    for _ in range(40):
        toys.loss_of(model).backward()
    optimizer.step()
    for _ in range(70):
        toys.loss_of(model).backward()
    optimizer.step()
