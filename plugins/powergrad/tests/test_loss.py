import re

import pytest
import torch
from regrad_powergrad import PowerGradCrossEntropyLoss
from regrad_powergrad.functional import power_grad_cross_entropy
from torch import nn

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0])


@pytest.fixture
def batch(generator):
    return torch.randn(6, 5, generator=generator), torch.tensor([0, 1, 2, 3, 4, -1])


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"weight": WEIGHT}]
)
def test_the_module_is_the_function_with_its_arguments(options, batch):
    logits = batch[0].requires_grad_()
    results = [
        PowerGradCrossEntropyLoss(alpha=0.3, ignore_index=-1, **options)(*batch),
        power_grad_cross_entropy(*batch, alpha=0.3, ignore_index=-1, **options),
    ]
    assert torch.equal(*results)
    assert torch.equal(*[torch.autograd.grad(result, logits)[0] for result in results])


def test_evaluation_mode_changes_nothing(batch):
    logits = batch[0].requires_grad_()
    criterion = PowerGradCrossEntropyLoss(ignore_index=-1)
    gradients = [
        torch.autograd.grad(criterion.train(mode)(*batch), logits)[0] for mode in (True, False)
    ]
    assert torch.equal(*gradients)


def test_alpha_one_is_torchs_module(batch):
    options = {"weight": WEIGHT, "ignore_index": -1, "label_smoothing": 0.1}
    assert torch.equal(
        PowerGradCrossEntropyLoss(alpha=1, **options)(*batch),
        nn.CrossEntropyLoss(**options)(*batch),
    )


def test_probabilities_are_those_that_were_fitted():
    criterion = PowerGradCrossEntropyLoss(alpha=0.25)
    # fourth roots of 16 : 1 are as 2 : 1
    logits = torch.tensor([16.0, 1.0]).log()
    for layout in (logits, logits[None], logits[None, :, None, None]):
        probabilities = criterion.probabilities(layout)
        assert probabilities.shape == layout.shape
        assert torch.allclose(probabilities.flatten(), torch.tensor([2 / 3, 1 / 3]))


def test_the_weight_is_a_buffer_and_the_alpha_is_printed():
    criterion = PowerGradCrossEntropyLoss(WEIGHT, alpha=0.5)
    assert criterion.double().weight.dtype == torch.float64
    assert repr(criterion) == "PowerGradCrossEntropyLoss(alpha=0.5)"


def test_alpha_is_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match=re.escape("alpha must be in (0, 1], got 2")):
        PowerGradCrossEntropyLoss(alpha=2)
