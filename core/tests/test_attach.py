"""What attach accepts, and how it follows the optimizer's parameters."""

import pytest
import regrad
import torch
from regrad import RegradError
from torch import nn


class Wrapped:
    """An optimizer as accelerate wraps it: no hooks of its own, the real one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class WrappedSubclass(torch.optim.Optimizer):
    """Accelerate's wrapper is even a subclass that never calls its parent's constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize(
    "wrapper", [Wrapped, WrappedSubclass, lambda o: Wrapped(WrappedSubclass(o))]
)
def test_a_wrapped_optimizer_is_unwrapped(toys, wrapper):
    model = toys.Net()
    inner = toys.sgd(model)
    optimizer, spy = wrapper(inner), toys.Spy()
    attachment = regrad.attach(model, optimizer, [spy])
    assert attachment.optimizer is inner
    toys.loss_of(model).backward()
    optimizer.step()
    assert spy.indices == [0]
    with pytest.raises(RegradError, match="already attached"):
        regrad.attach(model, inner, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "net"}, "model must be a torch.nn.Module, got str"),
        ({"optimizer": 3}, "optimizer must be a torch.optim.Optimizer or wrap one, got int"),
        ({"corrections": "scale"}, "corrections must be a list, got 'scale'; write"),
        ({"corrections": [3]}, "corrections must be names or Correction objects, got 3"),
        ({"criterion": 3}, "criterion must be callable, got 3"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(toys, change, message):
    model = toys.Net()
    arguments = {
        "model": model,
        "optimizer": toys.sgd(model),
        "corrections": [],
        "criterion": None,
        **change,
    }
    with pytest.raises(TypeError, match=message):
        regrad.attach(**arguments)


def test_an_optimizer_of_another_model_is_refused(toys):
    with pytest.raises(RegradError, match="optimizer must hold parameters of model, got none"):
        regrad.attach(toys.Net(), toys.sgd(toys.Net()), [])


def test_an_optimizer_is_attached_at_most_once_and_again_after_detach(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    first = regrad.attach(model, optimizer, [])
    with pytest.raises(RegradError, match="optimizer is already attached; detach"):
        regrad.attach(model, optimizer, [toys.Scale()])
    first.detach()
    regrad.attach(model, optimizer, [toys.Scale()])


def test_a_correction_object_is_attached_at_most_once_and_again_after_detach(toys):
    model, other, scale = toys.Net(), toys.Net(), toys.Scale()
    first = regrad.attach(model, toys.sgd(model), [scale])
    with pytest.raises(RegradError, match="'scale' is already attached; create"):
        regrad.attach(other, toys.sgd(other), [scale])
    first.detach()
    regrad.attach(other, toys.sgd(other), [scale])


def test_the_same_object_twice_in_one_list_is_refused(toys):
    model, scale = toys.Net(), toys.Scale()
    with pytest.raises(RegradError, match="got 'scale' twice"):
        regrad.attach(model, toys.sgd(model), [scale, scale])


def test_two_objects_of_one_name_are_refused_whatever_stands_between_them(toys):
    model = toys.Net()
    with pytest.raises(
        RegradError, match=r"must be different, got 'scale' twice in \[Scale.*, Add.*, Scale"
    ):
        regrad.attach(model, toys.sgd(model), [toys.Scale(), toys.Add(), toys.Scale(factor=0.25)])


def test_one_model_may_have_two_optimizers_each_with_its_own_corrections(toys, same_bits):
    model = toys.Net()
    body = torch.optim.SGD([*model.body.parameters(), *model.norm.parameters()], lr=0.1)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    shifts, spies = [toys.Shift(amount=0.25), toys.Shift(amount=2.0)], [toys.Spy(), toys.Spy()]
    regrad.attach(model, body, [shifts[0], spies[0]])
    regrad.attach(model, head, [shifts[1], spies[1]])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    for name, tensor in toys.weights_of(model).items():
        amount = 2.0 if name.startswith("head") else 0.25
        torch.testing.assert_close(
            tensor, true[name] + toys.away(true[name], amount), rtol=0, atol=0
        )
    assert same_bits(dict(model.state_dict()), true)
    body.step()
    head.step()
    assert [shift.calls for shift in shifts] == [1, 1]
    assert {name for spy in spies for name in spy.weights[0]} == set(true)
    assert same_bits({**spies[0].weights[0], **spies[1].weights[0]}, true)


def test_parameters_added_to_the_optimizer_take_part_from_the_next_step(toys, same_bits):
    model = toys.Net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    tally, shift, spy = toys.Tally(), toys.Shift(), toys.Spy()
    attachment = regrad.attach(model, optimizer, [tally, shift, spy])
    toys.train_step(model, optimizer)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.01})
    true = toys.weights_of(model)
    toys.train_step(model, optimizer)
    names = {"body.weight": 2, "body.bias": 2, "head.weight": 1, "head.bias": 1}
    assert {name: int(count) for name, count in tally.seen.items()} == names
    assert attachment.receipt()["corrections"][0]["matched"] == list(names)
    assert same_bits(spy.weights[1], {name: true[name] for name in names})


def test_a_layer_added_to_the_model_in_the_middle_gets_its_own_name(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    tally = toys.Tally()
    regrad.attach(model, optimizer, [tally])
    toys.train_step(model, optimizer)
    model.extra = nn.Linear(2, 2, dtype=torch.float64)
    optimizer.add_param_group({"params": list(model.extra.parameters())})
    toys.train_step(model, optimizer)
    assert {name: int(count) for name, count in tally.seen.items() if "extra" in name} == {
        "extra.weight": 1,
        "extra.bias": 1,
    }


def test_a_group_added_inside_the_window_neither_moves_nor_breaks_the_restore(toys, same_bits):
    model = toys.Net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    spy = toys.Spy()
    regrad.attach(model, optimizer, [toys.Shift(), spy])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    optimizer.add_param_group({"params": list(model.head.parameters())})
    optimizer.step()
    assert same_bits(spy.weights[0], {name: true[name] for name in spy.weights[0]})
    assert "head.weight" in spy.weights[0]


def test_unfreezing_in_the_middle_lets_state_by_name_grow(toys):
    model = toys.Net()
    model.head.requires_grad_(False)
    optimizer = toys.sgd(model)
    tally, shift = toys.Tally(), toys.Shift()
    attachment = regrad.attach(model, optimizer, [tally, shift])
    toys.train_step(model, optimizer)
    assert "head.weight" not in tally.seen
    model.head.requires_grad_(True)
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    before = true["head.weight"]
    torch.testing.assert_close(
        model.head.weight.detach(), before + toys.away(before, 0.5), rtol=0, atol=0
    )
    optimizer.step()
    assert int(tally.seen["head.weight"]) == 1
    assert int(tally.seen["body.weight"]) == 2
    assert attachment.metrics()["tally/names"] == 6


def test_freezing_inside_the_window_still_restores(toys, same_bits):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Shift()])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    model.head.requires_grad_(False)
    model.zero_grad()
    optimizer.step()
    assert same_bits(toys.weights_of(model), true)


def test_tied_weights_are_moved_restored_and_corrected_once(toys, same_bits):
    model = toys.Tied().double()
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    attachment = regrad.attach(model, optimizer, [toys.Shift(), toys.Scale(factor=0.5), spy])
    assert attachment.receipt()["corrections"][1]["matched"] == ["first.weight"]
    true = toys.weights_of(model)
    inputs = toys.batch()[0]
    model(inputs).square().sum().backward()
    before = true["first.weight"]
    torch.testing.assert_close(
        model.first.weight.detach(), before + toys.away(before, 0.5), rtol=0, atol=0
    )
    gradient = model.first.weight.grad.clone()
    optimizer.step()
    assert same_bits(spy.weights[0], true)
    assert same_bits(spy.gradients[0], {"first.weight": gradient * 0.5})
    assert model.second.weight is model.first.weight


def test_attaching_to_a_wrapper_names_parameters_as_the_users_module_does(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    compiled = torch.compile(model, backend="eager")
    attachment = regrad.attach(compiled, optimizer, [toys.Scale()])
    assert attachment.model is model
    assert attachment.receipt()["corrections"][0]["matched"] == [
        name for name, _ in model.named_parameters()
    ]


def test_parameters_outside_the_model_are_corrected_too_under_a_name_of_their_own(toys):
    model = toys.Net()
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [scale]}], lr=0.1)
    attachment = regrad.attach(model, optimizer, [toys.Scale(factor=0.5)])
    (toys.loss_of(model) + 2 * scale).backward()
    optimizer.step()
    assert scale.item() == pytest.approx(1 - 0.1 * 0.5 * 2)
    matched = attachment.receipt()["corrections"][0]["matched"]
    assert len(matched) == len(set(matched)) == 7


def test_a_step_tells_groups_rates_names_and_index(toys):
    seen = []

    class Reads(toys.Scale):
        def correct_gradients(self, step):
            rates = [step.lr_of(p) for p in step.parameters]
            groups = [
                step.group_of(p) is step.optimizer.param_groups[n.startswith("head")]
                for n, p in pairs(step)
            ]
            seen.append(
                (
                    step.index,
                    rates,
                    all(groups),
                    step.correction is self,
                    step.optimizer is optimizer,
                )
            )

    def pairs(step):
        return zip(step.names, step.parameters, strict=True)

    model = toys.Net()
    rest = [*model.body.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": rest}, {"params": list(model.head.parameters()), "lr": 0.5}], lr=0.1
    )
    regrad.attach(model, optimizer, [Reads()])
    toys.train_step(model, optimizer)
    toys.train_step(model, optimizer)
    assert seen == [(index, [0.1] * 4 + [0.5] * 2, True, True, True) for index in (0, 1)]
