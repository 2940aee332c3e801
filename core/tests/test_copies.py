"""Copies of an attached model are plain models."""

import copy
import io
import warnings

import pytest
import regrad
import torch
from torch.optim.swa_utils import AveragedModel


@pytest.fixture
def attached(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    shift = toys.Shift()
    attachment = regrad.attach(model, optimizer, [shift, toys.Listen()])
    toys.train_step(model, optimizer)
    return model, optimizer, shift, attachment


def copied(model):
    return copy.deepcopy(model)


def averaged(model):
    return AveragedModel(model).module


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copied, averaged, saved_and_loaded])
def test_a_copy_is_inert_and_holds_the_same_weights(toys, same_bits, attached, copy_of):
    model, _, shift, attachment = attached
    calls, heard = shift.calls, len(attachment.corrections[1].heard)
    twin = copy_of(model)
    before = toys.weights_of(twin)
    assert same_bits(before, toys.weights_of(model))
    twin.train()
    loss = toys.loss_of(twin)
    loss.backward()
    assert same_bits(toys.weights_of(twin), before)
    assert same_bits(dict(twin.state_dict()), before)
    twin.load_state_dict(model.state_dict())
    assert (shift.calls, len(attachment.corrections[1].heard)) == (calls, heard)


@pytest.mark.parametrize("copy_of", [copied, averaged, saved_and_loaded])
def test_using_a_copy_does_not_disturb_the_window_of_the_original(
    toys, same_bits, attached, copy_of
):
    model, optimizer, shift, _ = attached
    twin = copy_of(model)
    toys.loss_of(model).backward()
    moved = toys.weights_of(model)
    twin.eval()
    toys.loss_of(twin)
    twin.state_dict()
    assert same_bits(toys.weights_of(model), moved)
    optimizer.step()
    assert shift.calls == 2


def test_a_shallow_copy_such_as_a_replica_fires_no_hook(toys, same_bits, attached):
    model, _, shift, _ = attached
    toys.loss_of(model).backward()
    moved = toys.weights_of(model)
    replica = copy.copy(model)
    replica.eval()
    toys.loss_of(replica)
    replica.state_dict()
    assert same_bits(toys.weights_of(model), moved)
    assert shift.calls == 2


def test_a_copy_taken_inside_the_window_holds_the_predicted_weights_as_documented(toys, attached):
    model, *_ = attached
    true = toys.weights_of(model)
    toys.loss_of(model)
    twin = copy.deepcopy(model)
    before = true["body.weight"]
    torch.testing.assert_close(
        twin.body.weight.detach(), before + toys.away(before, 0.5), rtol=0, atol=0
    )


def test_an_average_updated_before_the_step_sees_the_predicted_weights_as_documented_and_after_it_the_true_ones(
    toys, same_bits
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    average, steps = AveragedModel(model, avg_fn=lambda mean, new, count: new), toys.Shift()
    regrad.attach(model, optimizer, [steps])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    average.update_parameters(model)
    average.update_parameters(model)
    before = true["head.bias"]
    torch.testing.assert_close(
        average.module.head.bias.detach(), before + toys.away(before, 0.5), rtol=0, atol=0
    )
    optimizer.step()
    average.update_parameters(model)
    assert same_bits(toys.weights_of(average.module), toys.weights_of(model))


def hooks_of(model):
    tables = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks")
    tables += ("_load_state_dict_pre_hooks",)
    return [
        hook for m in model.modules() for table in tables for hook in getattr(m, table).values()
    ]


@pytest.mark.parametrize("copy_of", [copied, averaged, saved_and_loaded])
def test_a_copy_holds_no_hook_of_ours_and_those_of_others(toys, attached, copy_of):
    model, *_ = attached
    model.body.register_forward_hook(others_hook)
    twin = copy_of(model)
    assert hooks_of(twin) == [others_hook]
    assert not any("__reduce_ex__" in vars(module) for module in twin.modules())


def others_hook(module, inputs, output):
    """A hook that is not ours, which pickle finds by name."""


def test_copies_of_copies_over_many_attachments_hold_no_hook(toys):
    model = toys.Net()
    for _ in range(4):
        optimizer = toys.sgd(model)
        with regrad.attach(model, optimizer, [toys.Shift(), toys.Listen()]):
            toys.train_step(model, optimizer)
            best = copy.deepcopy(model)
        assert hooks_of(model) == []
        assert not any("__reduce_ex__" in vars(module) for module in model.modules())
        model = best
    assert hooks_of(model) == []


def test_a_file_of_an_attached_model_names_nothing_of_regrad(toys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2).double())
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Shift()], torch.nn.CrossEntropyLoss())
    toys.train_step(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model, "criterion": attachment.criterion}, file)
    assert b"regrad" not in file.getvalue()
    file.seek(0)
    allowed = [torch.nn.Sequential, torch.nn.Linear, torch.nn.CrossEntropyLoss, set]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(file, weights_only=True)
    inputs = toys.batch()[0]
    assert torch.equal(loaded["model"](inputs), model.eval()(inputs))


@pytest.mark.parametrize("of", ["copy", "detached"])
def test_a_copy_and_a_detached_model_can_be_exported_and_scripted(toys, attached, of):
    model, _, _, attachment = attached
    if of == "copy":
        model = copy.deepcopy(model)
    else:
        attachment.detach()
    inputs = toys.batch()[0]
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against it
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(inputs), model(inputs))


def test_a_copy_can_be_attached_itself(toys, attached):
    model, *_ = attached
    twin = copy.deepcopy(model)
    optimizer = toys.sgd(twin)
    shift = toys.Shift()
    regrad.attach(twin, optimizer, [shift])
    toys.train_step(twin, optimizer)
    assert shift.calls == 1


def test_a_model_that_keeps_the_criterion_can_still_be_copied(toys):
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Louder()], torch.nn.CrossEntropyLoss())
    model.criterion = attachment.criterion
    twin = copy.deepcopy(model)
    logits, labels = model(toys.batch()[0]), toys.batch()[1]
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(model.criterion(logits, labels), 3 * plain)
    torch.testing.assert_close(twin.criterion(logits, labels), plain)


def test_a_model_saved_whole_after_detach_needs_no_regrad_to_be_read(toys):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [toys.Shift()]):
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(model, file)
    assert b"regrad" not in file.getvalue()
