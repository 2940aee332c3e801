import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F


@pytest.fixture(scope="session")
def reference():
    """The rule as the paper writes it: float64, loops."""
    spec = importlib.util.spec_from_file_location(
        "powergrad_reference", Path(__file__).with_name("reference.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle():
    """The same rule as one identity: the gradient of cross_entropy(alpha * z, ...) / alpha."""

    def gradient(logits, target, *, alpha, upstream=None, **options):
        logits = logits.detach().requires_grad_()
        loss = F.cross_entropy(alpha * logits, target, **options) / alpha
        return torch.autograd.grad(loss, logits, upstream)[0]

    return gradient


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
