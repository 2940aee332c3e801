import pytest
import torch
from regrad_adafisher.loss_scale import loss_scale
from torch import nn


class Asking(torch.optim.SGD):
    """Asks within its step, as a correction does."""

    def step(self, closure=None):
        self.heard = loss_scale()
        return super().step(closure)


@pytest.mark.parametrize(("enabled", "scale"), [(True, 256.0), (False, 1.0)])
def test_the_scale_is_that_of_the_scaler_that_steps(enabled, scale):
    model = nn.Linear(2, 1)
    optimizer = Asking(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.heard == scale


def test_a_step_without_a_scaler_has_scale_one():
    optimizer = Asking([nn.Parameter(torch.zeros(1))], lr=0.1)
    torch.amp.GradScaler("cpu", init_scale=256.0)  # one that does not step
    optimizer.step()
    assert optimizer.heard == 1.0
