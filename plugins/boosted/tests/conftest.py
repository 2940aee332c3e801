import pytest
import torch
from regrad_testing import load_beside

LOGITS = (
    ((0.2, -0.1, 0.4), (1.0, 0.0, -1.0)),
    ((-0.3, 0.5, 0.1), (0.2, 0.2, 0.6)),
    ((0.7, 0.1, -0.2), (-0.5, 0.4, 0.3)),
)
TARGET = (2, 0)


@pytest.fixture(scope="session")
def reference():
    """The rule as the paper writes it: float64, loops."""
    return load_beside(__file__, "reference")


@pytest.fixture
def outputs():
    """The logits of three exits of the worked example, [2, 3] each, float64, leaves."""
    return [torch.tensor(rows, dtype=torch.float64, requires_grad=True) for rows in LOGITS]


@pytest.fixture
def target():
    return torch.tensor(TARGET)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
