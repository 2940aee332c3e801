"""What corrections ask of torch's optimizers."""

import pytest
import torch
from regrad.optimizers import (
    FIRST_MOMENTS,
    decoupled_decay,
    first_moment_key,
    looks_ahead,
    nesterov_control,
    parameters_of,
    stepped_by,
)
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop


def stepped(kind, **options):
    """Return an optimizer after one step with gradient 2, and its parameter."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = kind([parameter], lr=0.1, **options)
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    return optimizer, parameter


def decay_of(kind, **options):
    """Return the decoupled decay of an optimizer's only group."""
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    return decoupled_decay(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("kind", [AdamW, torch.optim.Adafactor])
def test_decay_of_torchs_decoupled_classes_is_known(kind):
    assert decay_of(kind, lr=0.1, weight_decay=0.2) == 0.2


@pytest.mark.parametrize("kind", [SGD, Adam, NAdam, RMSprop])
def test_decay_that_torch_adds_to_the_gradient_is_none_of_the_weights(kind):
    assert decay_of(kind, lr=0.1, weight_decay=0.2) == 0.0


def test_a_group_says_whether_its_decay_is_decoupled():
    assert decay_of(Adam, weight_decay=0.2, decoupled_weight_decay=True) == 0.2
    foreign = type("Foreign", (SGD,), {"__module__": "elsewhere"})
    assert decay_of(foreign, lr=0.1) == 0.0
    assert decay_of(foreign, lr=0.1, weight_decay=0.2) is None
    optimizer = foreign([torch.nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.2)
    for said, wanted in ((True, 0.2), (False, 0.0)):
        optimizer.param_groups[0]["decoupled_weight_decay"] = said
        assert decoupled_decay(optimizer, optimizer.param_groups[0]) == wanted


def test_the_parameters_of_all_groups_come_in_order_with_the_frozen_ones():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[1].requires_grad_(False)
    groups = [{"params": parameters[:2]}, {"params": []}, {"params": parameters[2:]}]
    found = parameters_of(SGD(groups, lr=0.1))
    assert all(one is other for one, other in zip(found, parameters, strict=True))


@pytest.mark.parametrize("kind", FIRST_MOMENTS, ids=lambda kind: kind.__name__)
def test_the_first_moment_is_where_the_table_says(kind):
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer, parameter = stepped(kind, **options)
    share = 1 if kind is SGD else 1 - optimizer.param_groups[0]["betas"][0]
    moment = optimizer.state[parameter][first_moment_key(optimizer)]
    torch.testing.assert_close(moment, torch.tensor([2.0 * share]))


def test_a_subclass_may_keep_something_else_under_the_same_key():
    class Own(Adam):
        pass

    assert first_moment_key(stepped(Own)[0]) is None
    assert first_moment_key(stepped(RMSprop, momentum=0.9)[0]) is None


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (SGD, {"momentum": 0.9, "nesterov": True}, True),
        (SGD, {"momentum": 0.9}, False),
        (NAdam, {}, True),
        (AdamW, {}, False),
    ],
)
def test_an_optimizer_that_takes_a_nesterov_step_looks_ahead(kind, options, expected):
    assert looks_ahead(stepped(kind, **options)[0]) is expected


def test_one_group_with_a_nesterov_step_is_enough():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "nesterov": True}]
    assert looks_ahead(SGD(groups, lr=0.1, momentum=0.9))


def test_a_subclass_of_nadam_looks_ahead_too():
    class Own(NAdam):
        pass

    assert looks_ahead(stepped(Own)[0])


def test_the_control_of_looking_ahead_is_nesterovs_momentum_on_sgd_with_momentum():
    control = nesterov_control(stepped(SGD, momentum=0.9)[0])
    assert control.name == "nesterov"
    assert control.optimizer == {"nesterov": True}


def test_without_plain_momentum_there_is_no_control():
    class Own(SGD):
        pass

    assert nesterov_control(stepped(SGD)[0]) is None
    assert nesterov_control(stepped(SGD, momentum=0.9, dampening=0.5)[0]) is None
    assert nesterov_control(stepped(Own, momentum=0.9)[0]) is None
    assert nesterov_control(stepped(RMSprop, momentum=0.9)[0]) is None


def test_every_group_must_have_plain_momentum():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "momentum": 0.0}]
    assert nesterov_control(SGD(groups, lr=0.1, momentum=0.9)) is None


@pytest.mark.parametrize(
    ("kind", "options", "decoupled"),
    [(AdamW, {}, True), (Adam, {}, False), (Adam, {"decoupled_weight_decay": True}, True)],
)
def test_on_adam_the_control_is_nadam_with_the_same_kind_of_decay(kind, options, decoupled):
    control = nesterov_control(stepped(kind, **options)[0])
    assert control.name == "nadam"
    assert control.optimizer_class is NAdam
    assert control.optimizer == {"decoupled_weight_decay": decoupled}


def test_where_nadam_is_not_adams_step_with_nesterovs_momentum_there_is_no_control():
    class Own(AdamW):
        pass

    assert nesterov_control(stepped(Own)[0]) is None
    assert nesterov_control(stepped(AdamW, amsgrad=True)[0]) is None
    assert nesterov_control(stepped(Adam, betas=(0.0, 0.9))[0]) is None
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    groups[1]["decoupled_weight_decay"] = True
    assert nesterov_control(Adam(groups)) is None
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "amsgrad": True}]
    assert nesterov_control(AdamW(groups)) is None


def test_what_is_cut_by_rank_is_judged_by_the_optimizer_that_it_steps():
    class Cut(torch.optim.Optimizer):
        """Holds another optimizer, as torch's ZeroRedundancyOptimizer does."""

        def __init__(self, inner):
            super().__init__(inner.param_groups[0]["params"], {})
            self.optim = inner

    weight = torch.nn.Parameter(torch.zeros(1))
    inner = NAdam([weight])
    assert stepped_by(Cut(inner)) is inner
    assert looks_ahead(Cut(inner))
    assert not looks_ahead(Cut(SGD([weight])))
