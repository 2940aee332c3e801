"""What a correction is told of a step."""

import typing

import pytest
import torch
from regrad import RegradError
from regrad.correction import HOOK_OF_STAGE, Stage
from regrad.hookspecs import HOOKS, Step, learning_rate


def test_every_stage_has_a_hook_in_time_order_and_one_hook_has_no_stage():
    assert (*HOOK_OF_STAGE.values(), "after_step") == HOOKS
    assert tuple(HOOK_OF_STAGE) == typing.get_args(Stage)


@pytest.mark.parametrize("rate", [0.1, 0, torch.tensor(0.1), torch.tensor([0.1])], ids=str)
def test_a_learning_rate_is_handed_out_as_the_optimizer_keeps_it(rate):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    optimizer.param_groups[0]["lr"] = rate
    assert Step(optimizer, 0).lr_of(weight) is rate
    assert learning_rate(optimizer, optimizer.param_groups[0]) is rate


@pytest.mark.parametrize("rate", [None, "0.1", True, max, torch.ones(2)], ids=str)
def test_what_is_no_learning_rate_is_refused_with_what_to_do(rate):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    optimizer.param_groups[0]["lr"] = rate
    rule = r"lr must be a number in every parameter group of SGD, got .*; give it one when you make"
    with pytest.raises(RegradError, match=rule):
        Step(optimizer, 0).lr_of(weight)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(RegradError, match="got None; give it one"):
        learning_rate(optimizer, optimizer.param_groups[0])


@pytest.fixture
def step():
    trained = torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(3))
    trained.grad = torch.tensor([3.0, 4.0])
    groups = [{"params": [trained, frozen]}, {"params": [unused], "lr": 0.5}]
    step = Step(torch.optim.SGD(groups, lr=0.1), 0)
    step.names = ["trained", "unused"]
    return step


def test_a_steps_parameters_come_with_their_names_in_the_order_of_its_groups(step):
    assert [(name, p.numel()) for name, p in step.named_parameters()] == [
        ("trained", 2),
        ("unused", 3),
    ]
    assert [step.lr_of(p) for _, p in step.named_parameters()] == [0.1, 0.5]


def test_only_gradients_that_are_there_come_with_their_names_to_be_changed_in_place(step):
    for _, gradient in step.named_gradients():
        gradient.mul_(2)
    assert [(name, g.tolist()) for name, g in step.named_gradients()] == [("trained", [6.0, 8.0])]
    assert step.parameters[0].grad.tolist() == [6.0, 8.0]


def test_a_step_without_names_says_so_instead_of_yielding_nothing(step):
    step.names = []
    with pytest.raises(ValueError, match=r"shorter|longer"):
        list(step.named_parameters())
