"""The criterion that the loop calls."""

import copy

import pytest
import regrad
import torch
from regrad import Correction, RegradError, RegradWarning
from regrad.correction import Needs
from torch import nn


@pytest.fixture
def louder(toys):
    model = toys.Net()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    attachment = regrad.attach(model, toys.sgd(model), [toys.Louder(factor=3.0)], criterion)
    inputs, labels = toys.batch()
    return (
        model,
        criterion,
        attachment,
        lambda: attachment.criterion(model(inputs), labels),
        labels,
        inputs,
    )


def test_the_criterion_is_corrected_only_while_the_model_trains_and_never_after_detach(louder):
    model, criterion, attachment, loss, labels, inputs = louder
    plain = criterion(model(inputs), labels)
    kept = attachment.criterion
    torch.testing.assert_close(loss(), 3 * plain, rtol=0, atol=1e-15)
    model.eval()
    torch.testing.assert_close(loss(), plain, rtol=0, atol=0)
    model.train()
    torch.testing.assert_close(loss(), 3 * plain, rtol=0, atol=1e-15)
    attachment.detach()
    torch.testing.assert_close(loss(), plain, rtol=0, atol=0)
    torch.testing.assert_close(kept(model(inputs), labels), plain, rtol=0, atol=0)


def test_the_gradient_is_that_of_the_corrected_criterion(toys, louder):
    model, criterion, _, loss, labels, inputs = louder
    loss().backward()
    corrected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    criterion(model(inputs), labels).backward()
    for one, other in zip(corrected, model.parameters(), strict=True):
        torch.testing.assert_close(one, 3 * other.grad, rtol=1e-12, atol=1e-15)


def test_keyword_arguments_go_through(louder):
    model, criterion, attachment, _, labels, inputs = louder
    logits = model(inputs)
    torch.testing.assert_close(
        attachment.criterion(logits, target=labels), 3 * criterion(logits, labels)
    )
    torch.testing.assert_close(
        attachment.criterion(input=logits, target=labels), 3 * criterion(logits, labels)
    )


def test_attributes_are_those_of_the_users_criterion(louder):
    _, criterion, attachment, *_ = louder
    assert attachment.criterion.label_smoothing == 0.1
    assert attachment.criterion.reduction == "mean"
    assert attachment.criterion.parameters
    criterion.label_smoothing = 0.2
    assert attachment.criterion.label_smoothing == 0.2
    with pytest.raises(AttributeError):
        _ = attachment.criterion.no_such_attribute


class Task(nn.Module):
    """Keeps model and loss as submodules, as timm's tasks and LightningModules do."""

    def __init__(self, model, criterion):
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, inputs, labels):
        return self.criterion(self.model(inputs), labels)


def test_a_module_can_hold_the_criterion_as_it_held_the_original(toys, same_bits):
    model = toys.Net()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0], dtype=torch.float64))
    task = Task(model, criterion)
    keys = list(task.state_dict())
    plain = task(*toys.batch())
    attachment = regrad.attach(model, toys.sgd(task), [toys.Louder(factor=3.0)], criterion)
    task.criterion = attachment.criterion
    assert isinstance(task.criterion, nn.Module)
    assert list(task.state_dict()) == keys
    torch.testing.assert_close(task(*toys.batch()), 3 * plain, rtol=0, atol=1e-15)
    task.eval()
    assert not criterion.training
    torch.testing.assert_close(task(*toys.batch()), plain, rtol=0, atol=0)
    task.train()
    assert criterion.training
    task.float()
    assert criterion.weight.dtype == torch.float32
    twin = copy.deepcopy(task)
    assert type(twin.criterion) is nn.CrossEntropyLoss
    attachment.detach()
    task.double()
    torch.testing.assert_close(task(*toys.batch()), plain, rtol=1e-6, atol=1e-6)


def test_what_is_set_on_the_criterion_is_set_on_the_original(louder):
    _, criterion, attachment, *_ = louder
    attachment.criterion.label_smoothing = 0.3
    assert criterion.label_smoothing == 0.3


def test_a_criterion_that_is_a_function_stays_one(toys):
    model = toys.Net()
    function = nn.functional.cross_entropy
    attachment = regrad.attach(model, toys.sgd(model), [toys.Louder()], function)
    assert not isinstance(attachment.criterion, nn.Module)
    assert attachment.criterion.__name__ == "cross_entropy"
    assert copy.deepcopy(attachment.criterion) is function


def test_the_criterion_says_what_it_is(toys, louder):
    _, _, attachment, *_ = louder
    assert repr(attachment.criterion) == (
        "CrossEntropyLoss(), corrected by 'louder' while the model trains"
    )
    attachment.detach()
    assert repr(attachment.criterion) == "CrossEntropyLoss()"


def test_a_criterion_that_the_loop_never_calls_is_warned_about_after_the_first_step(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Louder()], nn.CrossEntropyLoss())
    toys.loss_of(model).backward()
    with pytest.warns(RegradWarning, match="'louder' .* call it in the loop"):
        optimizer.step()
    toys.train_step(model, optimizer)


def test_without_an_owner_the_criterion_is_the_one_given(toys):
    model, criterion = toys.Net(), nn.CrossEntropyLoss()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Scale()], criterion)
    assert attachment.criterion is criterion


def test_a_criterion_correction_without_a_criterion_says_how(toys):
    model = toys.Net()
    with pytest.raises(RegradError, match=r"'louder' corrects the criterion; pass .*criterion="):
        regrad.attach(model, toys.sgd(model), [toys.Louder()])


def test_asking_for_a_criterion_that_was_not_given_says_how(toys):
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Scale()])
    with pytest.raises(RegradError, match=r"attachment has no criterion; pass .*criterion="):
        _ = attachment.criterion


def test_a_criterion_without_gradients_is_not_measured(toys, louder):
    _, _, attachment, loss, *_ = louder
    with torch.no_grad():
        loss()
    assert attachment.receipt()["effects"] == {}


def test_a_function_may_be_the_criterion(toys):
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Louder()], nn.functional.cross_entropy)
    inputs, labels = toys.batch()
    logits = model(inputs)
    torch.testing.assert_close(
        attachment.criterion(logits, labels), 3 * nn.functional.cross_entropy(logits, labels)
    )


def test_unreduced_losses_keep_their_shape(toys):
    model = toys.Net()
    attachment = regrad.attach(
        model, toys.sgd(model), [toys.Louder()], nn.CrossEntropyLoss(reduction="none")
    )
    inputs, labels = toys.batch()
    assert attachment.criterion(model(inputs), labels).shape == (8,)
    assert attachment.receipt()["effects"]["louder"]["criterion"][
        "relative_change"
    ] == pytest.approx(2, rel=1e-5)


def test_under_accumulation_every_micro_batch_is_corrected(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    attachment = regrad.attach(model, optimizer, [toys.Louder(), spy], nn.CrossEntropyLoss())
    inputs, labels = toys.batch(8)
    for part, target in zip(inputs.chunk(2), labels.chunk(2), strict=True):
        (attachment.criterion(model(part), target) / 2).backward()
    optimizer.step()
    twin = toys.Net()
    (3 * nn.functional.cross_entropy(twin(inputs), labels)).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(spy.gradients[0][name], parameter.grad, rtol=0, atol=1e-14)


class OfExits(nn.Module):
    """Doubles the second exit's loss; says what evaluation and the meter see instead."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, target):
        return self.criterion(outputs[0], target) + 2 * self.criterion(outputs[1], target)

    def uncorrected(self, outputs, target):
        return self.criterion(outputs[0], target) + self.criterion(outputs[1], target)

    def in_evaluation(self, outputs, target):
        return self.criterion(outputs[1], target)


class LouderSecond(Correction):
    """Corrects a criterion of one tensor on a model that returns several."""

    name = "louder-second"
    needs = Needs(stages=("criterion",), reads=("criterion",))

    def wrap_criterion(self, criterion):
        return OfExits(criterion)


class TwoExits(nn.Linear):
    def forward(self, inputs):
        logits = super().forward(inputs)
        return logits, 3 * logits


def test_several_outputs_are_measured_and_evaluated_as_the_correction_says():
    model = TwoExits(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    inputs, target = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    with regrad.attach(model, optimizer, [LouderSecond()], criterion) as attachment:
        outputs = model(inputs)
        wanted = criterion(outputs[0], target) + 2 * criterion(outputs[1], target)
        assert torch.equal(attachment.criterion(outputs, target), wanted)
        metrics = attachment.metrics()
        assert metrics["louder-second/criterion/share_touched"] == 0.5
        model.eval()
        evaluated = attachment.criterion(model(inputs), target)
        assert torch.equal(evaluated, criterion(outputs[1], target))
