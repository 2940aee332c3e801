"""Controls made on an optimizer that lives already."""

import pytest
import regrad
import torch
from regrad import RegradError
from regrad.correction import Control
from regrad_runner.scripts.controls import apply_control, check_fits, control_named
from torch import nn

HEAD = {"2.weight", "2.bias"}


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def trained(model, optimizer, steps=4):
    inputs = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(10, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_rates_and_initial_head_are_those_of_groups_of_their_own(kind):
    control = Control(name="scaled", head_init=0.5, head_lr=2.0, body_lr=0.25)
    found = network()
    optimizer = kind(found.parameters(), lr=0.01)
    apply_control(control, found, optimizer)
    wanted = network()
    head = [value for name, value in wanted.named_parameters() if name in HEAD]
    body = [value for name, value in wanted.named_parameters() if name not in HEAD]
    with torch.no_grad():
        for parameter in head:
            parameter.mul_(0.5)
    groups = [{"params": body, "lr": 0.0025}, {"params": head, "lr": 0.02}]
    ends, others = trained(found, optimizer), trained(wanted, kind(groups))
    for name in ends:
        torch.testing.assert_close(ends[name], others[name], rtol=1e-12, atol=1e-14)


def test_a_neutral_control_changes_no_bit():
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_control(Control(name="neutral"), model, optimizer)
    ends = trained(model, optimizer)
    others = trained(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert all(torch.equal(ends[name], others[name]) for name in ends)


def test_an_option_that_the_optimizer_does_not_have_is_refused_before_anything_changed():
    model, plain = network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    control = Control(name="nesterov", optimizer={"nesterov": True}, head_init=0.5)
    with pytest.raises(RegradError, match="'nesterov' sets nesterov, which Adam does not have"):
        apply_control(control, model, optimizer)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_name_that_no_correction_declares_is_refused_with_those_there_are():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(RegradError, match="no control named 'nesterof' for SGD; there are: "):
        control_named("nesterof", optimizer)


def test_an_optimizer_class_other_than_nadam_is_refused():
    model = network()
    control = Control(name="radam", optimizer_class=torch.optim.RAdam)
    with pytest.raises(RegradError, match="'radam' trains with RAdam, whose steps a live AdamW"):
        apply_control(control, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    "control",
    [
        Control(name="nesterov", optimizer={"nesterov": True}),
        Control(name="scaled", head_init=0.3, head_lr=2.0, body_lr=0.25),
        Control(name="nadam", optimizer_class=torch.optim.NAdam),
    ],
    ids=lambda control: control.name,
)
def test_undone_a_control_leaves_no_trace(control):
    def made():
        model = network()
        if control.name == "nesterov":
            return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = made()
    plain, other = made()
    apply_control(control, model, optimizer).close()
    assert vars(optimizer)["defaults"] == other.defaults
    assert [{**group, "params": 0} for group in optimizer.param_groups] == [
        {**group, "params": 0} for group in other.param_groups
    ]
    ends, wanted = trained(model, optimizer), trained(plain, other)
    assert all(torch.equal(ends[name], wanted[name]) for name in ends)
    state = optimizer.state_dict()["state"]
    assert [set(kept) for kept in state.values()] == [
        set(kept) for kept in other.state_dict()["state"].values()
    ]


def test_a_group_that_is_added_later_has_the_controls_options_too():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    apply_control(Control(name="nesterov", optimizer={"nesterov": True}), model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert [group["nesterov"] for group in optimizer.param_groups] == [True, True]


@pytest.mark.parametrize(
    ("control", "is_refused"),
    [
        (Control(name="scaled", head_lr=2.0), True),
        (Control(name="nadam", optimizer_class=torch.optim.NAdam), True),
        (Control(name="nesterov", optimizer={"nesterov": True}, head_init=0.5), False),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
@pytest.mark.skipif("xgrad" not in regrad.available(), reason="needs the plugin regrad-xgrad")
def test_a_prediction_of_steps_that_are_changed_afterwards_is_refused(control, is_refused):
    corrections = [regrad.create("xgrad")]
    if not is_refused:
        check_fits(control, corrections)
        return
    with pytest.raises(RegradError, match=r"changes steps after .* and 'xgrad' predicts them"):
        check_fits(control, corrections)
