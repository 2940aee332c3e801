"""The window never destroys what somebody else wrote while it was open."""

import warnings

import pytest
import regrad
import torch
from regrad import RegradError, RegradWarning
from torch import nn


@pytest.fixture
def inside(toys):
    """Return a model with an open window, its optimizer, its attachment and its true weights."""
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Shift()])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    return model, optimizer, attachment, true


def by_add(parameter):
    with torch.no_grad():
        parameter.add_(1.0)


def by_data(parameter):
    parameter.data.add_(1.0)


def by_copy(parameter):
    with torch.no_grad():
        parameter.copy_(torch.full_like(parameter, 3.0))


def by_new_data(parameter):
    parameter.data = torch.full_like(parameter, 3.0)


def by_not_a_number(parameter):
    parameter.data.fill_(torch.nan)


WRITES = [by_add, by_data, by_copy, by_new_data, by_not_a_number]


def closed_by_evaluation(toys, model, optimizer, attachment):
    model.eval()
    toys.loss_of(model)


def closed_by_step(toys, model, optimizer, attachment):
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()


def closed_by_detach(toys, model, optimizer, attachment):
    attachment.detach()


def closed_by_the_next_forward(toys, model, optimizer, attachment):
    toys.loss_of(model)


def closed_by_a_load_of_the_optimizer(toys, model, optimizer, attachment):
    optimizer.load_state_dict(optimizer.state_dict())


CLOSINGS = [
    closed_by_evaluation,
    closed_by_step,
    closed_by_detach,
    closed_by_the_next_forward,
    closed_by_a_load_of_the_optimizer,
]


@pytest.mark.parametrize("close", CLOSINGS)
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_inside_the_window_stays_and_the_rest_is_restored(
    toys, same_bits, inside, write, close
):
    model, _, _, true = inside
    write(model.body.weight)
    written = model.body.weight.detach().clone()
    with pytest.warns(RegradWarning, match=r"1 of the weights that 'shift' moved .*body\.weight"):
        close(toys, *inside[:3])
    now = toys.weights_of(model)
    assert same_bits({"w": now.pop("body.weight")}, {"w": written})
    del true["body.weight"]
    assert same_bits(now, true)


@pytest.mark.parametrize("write", WRITES)
def test_a_state_dict_holds_what_was_written_and_the_true_weights_of_the_rest(
    toys, same_bits, inside, write
):
    model, _, _, true = inside
    write(model.body.weight)
    true["body.weight"] = model.body.weight.detach().clone()
    assert same_bits(dict(model.state_dict()), true)


def test_a_write_is_warned_about_once_and_the_prediction_pauses_until_the_own_step(toys, inside):
    model, optimizer, attachment, _ = inside
    shift = attachment.corrections[0]
    by_add(model.body.weight)
    with pytest.warns(RegradWarning, match="prediction pauses until SGD steps again"):
        toys.loss_of(model)
    calls = shift.calls
    for _ in range(3):
        by_add(model.body.weight)
        toys.loss_of(model).backward()
    assert shift.calls == calls
    optimizer.step()
    toys.loss_of(model)
    assert shift.calls == calls + 1


def test_a_part_that_loads_inside_the_window_keeps_what_it_loaded(toys, same_bits, inside):
    model, _, _, true = inside
    loaded = {name: torch.full_like(value, 2.0) for name, value in model.head.state_dict().items()}
    model.head.load_state_dict(loaded)
    model.eval()
    with pytest.warns(RegradWarning, match="2 of the weights"):
        toys.loss_of(model)
    expected = true | {f"head.{name}": value for name, value in loaded.items()}
    assert same_bits(toys.weights_of(model), expected)


def test_the_weights_of_a_model_that_was_converted_inside_the_window_are_restored(toys, inside):
    model, _, _, true = inside
    model.float()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(toys.batch(dtype=torch.float32)[0])
    for name, value in toys.weights_of(model).items():
        torch.testing.assert_close(value, true[name].float(), rtol=0, atol=0)


def trained_by_hand(toys, steps):
    """Train as `steps` say: each a list of (optimizer, moved or not), every gradient at one batch."""
    model = toys.Net()
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.05) for name in ("own", "other")}
    for seed, (name, is_predicted) in enumerate(steps):
        true = toys.weights_of(model)
        if is_predicted:
            toys.moved(model, 0.5)
        model.zero_grad()
        toys.loss_of(model, seed=seed).backward()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(true[key])
        optimizers[name].step()
    return toys.weights_of(model)


def with_closure(toys, model, optimizer, seed):
    def closure():
        optimizer.zero_grad()
        loss = toys.loss_of(model, seed=seed)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("step", ["plain", "closure"])
def test_another_optimizer_steps_from_the_true_weights(toys, same_bits, step):
    model = toys.Net()
    own, other = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    regrad.attach(model, own, [toys.Shift()])
    train = toys.train_step if step == "plain" else with_closure
    for seed, optimizer in enumerate([own, other, own, other]):
        if step == "plain":
            toys.train_step(model, optimizer, seed=seed)
        else:
            train(toys, model, optimizer, seed)
    expected = trained_by_hand(
        toys, [("own", True), ("other", True), ("own", True), ("other", True)]
    )
    assert same_bits(toys.weights_of(model), expected)


def test_a_second_phase_with_a_new_optimizer_trains_as_without_regrad_after_one_warning(
    toys, same_bits
):
    model = toys.Net()
    own, other = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    regrad.attach(model, own, [toys.Shift()])
    toys.train_step(model, own, seed=0)
    with pytest.warns(RegradWarning, match="SGD has updated weights of the attached SGD") as said:
        for seed in range(1, 6):
            toys.train_step(model, other, seed=seed)
    assert len(said) == 1
    trained = toys.weights_of(model)
    model.eval()
    toys.loss_of(model)
    assert same_bits(toys.weights_of(model), trained)
    phases = [("own", True), ("other", True), ("other", True), *[("other", False)] * 3]
    assert same_bits(trained, trained_by_hand(toys, phases))


def test_another_optimizer_of_other_parameters_leaves_the_window_open(toys, same_bits, inside):
    model, _, _, true = inside
    moved = toys.weights_of(model)
    stranger = nn.Parameter(torch.ones(2))
    stranger.grad = torch.ones(2)
    torch.optim.SGD([stranger], lr=0.1).step()
    assert same_bits(toys.weights_of(model), moved)
    assert not same_bits(moved, true)


def test_a_second_look_ahead_on_the_same_parameters_is_refused_until_the_first_is_detached(toys):
    model = toys.Net()
    first = regrad.attach(model, toys.sgd(model), [toys.Shift()])
    second = torch.optim.AdamW([*model.head.parameters()])
    with pytest.raises(RegradError, match=r"another attachment \(of SGD\) moves already; call det"):
        regrad.attach(model, second, [toys.Shift()])
    regrad.attach(model, second, [toys.Scale()]).detach()
    first.detach()
    regrad.attach(model, second, [toys.Shift()])


def test_parameters_that_two_windows_came_to_share_are_refused_when_both_would_move_them(toys):
    model, extra = toys.Net(), nn.Linear(3, 3).double()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD(extra.parameters(), lr=0.1)
    regrad.attach(model, first, [toys.Shift()])
    regrad.attach(extra, second, [toys.Shift()])
    second.add_param_group({"params": [model.body.weight]})
    toys.loss_of(model)
    with pytest.raises(RegradError, match="both move the same parameters"):
        extra(toys.batch()[0])


def test_two_attachments_without_shared_parameters_both_look_ahead(toys, same_bits):
    model = toys.Net()
    halves = [toys.Shift(), toys.Shift()]
    for part, shift in zip((model.body, model.head), halves, strict=True):
        regrad.attach(model, torch.optim.SGD(part.parameters(), lr=0.1), [shift])
    true = toys.weights_of(model)
    toys.loss_of(model)
    expected = {
        name: value if name.startswith("norm") else value + toys.away(value, 0.5)
        for name, value in true.items()
    }
    assert same_bits(toys.weights_of(model), expected)
    model.eval()
    toys.loss_of(model)
    assert same_bits(toys.weights_of(model), true)


def test_no_hook_on_all_optimizers_is_left_when_nothing_looks_ahead(toys):
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    before = len(_global_optimizer_pre_hooks)
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Shift()])
    attachment.detach()
    assert len(_global_optimizer_pre_hooks) <= before


def test_writes_on_a_device_are_kept_without_asking_it(toys, same_bits, inside, monkeypatch):
    """The way of a GPU, walked on the CPU: flags decide there, and nothing is read by the host."""
    model, _, attachment, true = inside
    for group in attachment.engine.window._samples._groups:
        monkeypatch.setattr(group, "is_on_host", False)
    by_data(model.body.weight)
    true["body.weight"] = model.body.weight.detach().clone()
    assert same_bits(dict(model.state_dict()), true)
    model.eval()
    toys.loss_of(model)
    assert same_bits(toys.weights_of(model), true)
    assert attachment.engine.window.overwritten_on_device.item() == 1
