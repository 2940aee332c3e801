"""What a correction is told of a step."""

import pytest
import torch
from regrad import RegradError
from regrad.hookspecs import Step, learning_rate


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
