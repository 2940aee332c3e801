"""Loops as HF Trainer, accelerate and Lightning write them, by small fakes."""

import contextlib
import warnings

import pytest
import regrad
import torch
from regrad import RegradWarning
from torch import nn


class FakeAccelerator:
    """What accelerate does around a loop: accumulate, clip, and step only on real steps."""

    def __init__(self, every):
        self.every, self.count, self.sync = every, 0, False

    def prepare(self, model, optimizer):
        class Prepared(torch.optim.Optimizer):
            def __init__(self, inner, accelerator):
                self.optimizer, self.accelerator = inner, accelerator

            def step(self, closure=None):
                if self.accelerator.sync:
                    self.optimizer.step(closure)

            def zero_grad(self):
                if self.accelerator.sync:
                    self.optimizer.zero_grad()

        return model, Prepared(optimizer, self)

    @contextlib.contextmanager
    def accumulate(self):
        self.count += 1
        self.sync = self.count % self.every == 0
        yield

    def backward(self, loss):
        (loss / self.every).backward()

    def clip(self, parameters, norm):
        if self.sync:
            nn.utils.clip_grad_norm_(parameters, norm)


def trainer_loop(toys, accelerator, model, optimizer, scheduler, *, clip=1e9):
    for seed in range(3):
        inputs, labels = toys.batch(32, seed=seed)
        for part, target in zip(inputs.chunk(4), labels.chunk(4), strict=True):
            with accelerator.accumulate():
                accelerator.backward(nn.functional.cross_entropy(model(part), target))
                accelerator.clip(model.parameters(), clip)
                optimizer.step()
                if accelerator.sync:
                    scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("attach_first", [False, True])
def test_an_accelerate_like_loop_gives_the_numbers_of_whole_batches(toys, attach_first):
    accelerator, model = FakeAccelerator(4), toys.Net()
    inner = toys.sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 3)
    shift, spy = toys.Push(amount=0.1), toys.Spy()
    corrections = [shift, toys.Scale(), spy]
    if attach_first:
        regrad.attach(model, inner, corrections)
    prepared, optimizer = accelerator.prepare(model, inner)
    if not attach_first:
        regrad.attach(prepared, optimizer, corrections)
    trainer_loop(toys, accelerator, prepared, optimizer, scheduler)

    whole = toys.Net()
    plain = toys.sgd(whole)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 3)
    regrad.attach(whole, plain, [toys.Push(amount=0.1), toys.Scale()])
    for seed in range(3):
        plain.zero_grad()
        toys.loss_of(whole, 32, seed=seed).backward()
        plain.step()
        plan.step()
    assert (shift.calls, spy.indices) == (3, [0, 1, 2])
    for name, value in toys.weights_of(whole).items():
        torch.testing.assert_close(toys.weights_of(model)[name], value, rtol=0, atol=1e-12)


def test_the_loops_own_clipping_comes_first_and_the_receipt_and_explanation_say_so(toys):
    accelerator, model = FakeAccelerator(4), toys.Net()
    inner = toys.sgd(model)
    spy = toys.Spy()
    attachment = regrad.attach(model, inner, [spy], nn.CrossEntropyLoss())
    _, optimizer = accelerator.prepare(model, inner)
    scheduler = torch.optim.lr_scheduler.ConstantLR(inner)
    trainer_loop(toys, accelerator, model, optimizer, scheduler, clip=0.01)
    norms = [
        torch.cat([g.flatten() for g in seen.values()]).norm().item() for seen in spy.gradients
    ]
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert any("clipping in the loop comes first" in note for note in attachment.receipt()["notes"])
    notes = attachment.explain(toys.batch()).notes
    assert any("clipping in the loop comes first" in note for note in notes)


class LightningModule(nn.Module):
    """A module whose own forward is never called: the trainer calls `training_step`."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, inputs, labels):
        return nn.functional.cross_entropy(self.net(inputs), labels)


def lightning_loop(toys, module, optimizer, steps=3):
    for seed in range(steps):
        inputs, labels = toys.batch(seed=seed)

        def closure(inputs=inputs, labels=labels):
            loss = module.training_step(inputs, labels)
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer.step(closure=closure)


def test_a_lightning_like_loop_gives_the_numbers_of_the_plain_loop(toys, same_bits):
    module = LightningModule(toys.Net())
    optimizer = toys.sgd(module)
    shift = toys.Push(amount=0.1)
    regrad.attach(module.net, optimizer, [shift, toys.Scale()])
    lightning_loop(toys, module, optimizer)
    plain = toys.Net()
    plain_optimizer = toys.sgd(plain)
    regrad.attach(plain, plain_optimizer, [toys.Push(amount=0.1), toys.Scale()])
    for seed in range(3):
        toys.train_step(plain, plain_optimizer, seed=seed)
    assert shift.calls == 3
    assert same_bits(toys.weights_of(module.net), toys.weights_of(plain))


def test_a_module_whose_forward_is_never_called_is_served_through_its_parts_from_the_second_step(
    toys, same_bits
):
    results = []
    for root in (False, True):
        module = LightningModule(toys.Net())
        optimizer = toys.sgd(module)
        shift = toys.Push(amount=0.1)  # does nothing in the first step
        regrad.attach(module if root else module.net, optimizer, [shift])
        lightning_loop(toys, module, optimizer, steps=4)
        results.append(toys.weights_of(module))
    assert same_bits(*results)


def test_a_model_of_which_no_part_is_called_is_warned_about_once(toys):
    module, other = LightningModule(toys.Net()), LightningModule(toys.Net())
    optimizer = toys.sgd(module)
    regrad.attach(module, optimizer, [toys.Shift()])
    with pytest.warns(
        RegradWarning, match="without a training forward of the attached model"
    ) as caught:
        lightning_loop(toys, other, optimizer, steps=4)
    assert len(caught) == 1


def test_a_step_after_an_observed_forward_is_not_warned_about(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            toys.train_step(model, optimizer, seed=seed)


def test_a_later_step_without_an_observed_forward_is_warned_about_too(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    toys.train_step(model, optimizer)
    with pytest.warns(RegradWarning, match="without a training forward of the attached model"):
        optimizer.step()


def test_an_empty_list_warns_about_nothing(toys):
    model, other = toys.Net(), toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [])
    other(toys.batch()[0])
    optimizer.step()


def test_a_submodule_stepped_by_the_outer_loop_may_be_attached_alone(toys):
    module = LightningModule(toys.Net())
    optimizer = toys.sgd(module)
    spy = toys.Spy()
    regrad.attach(module.net, optimizer, [spy])
    lightning_loop(toys, module, optimizer, steps=1)
    assert set(spy.gradients[0]) == {name for name, _ in module.net.named_parameters()}
