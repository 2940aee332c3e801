"""Steps that only make state."""

import pytest
import torch
from regrad.empty_steps import only_makes_state


@pytest.mark.parametrize(
    ("rate", "gradient", "expected"),
    [
        (0.0, torch.zeros(2), True),
        (torch.tensor(0.0), torch.zeros(2), True),
        (0.0, torch.tensor([0.0, 1.0]), False),
        (0.1, torch.zeros(2), False),
        (0.0, None, False),
        (0.0, torch.zeros(2).to_sparse(), False),
    ],
)
def test_a_step_with_rate_zero_and_gradients_of_zero_only_makes_state(rate, gradient, expected):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = gradient
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    assert only_makes_state(optimizer) is expected


def test_one_group_with_a_rate_is_a_step():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.zeros(2)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}]
    assert not only_makes_state(torch.optim.SGD(groups, lr=0.0))
