import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def reference():
    """The rule as in the card, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "gcode_reference", Path(__file__).with_name("reference.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(nn.Module):
    """Two convolutions beside a shortcut; the shape changes where asked."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1)
        self.norm = nn.GroupNorm(2, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        same = stride == 1 and inside == outside
        self.downsample = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x):
        return self.conv2(torch.tanh(self.norm(self.conv1(x)))) + self.downsample(x)


class Network(nn.Module):
    """A stem, two stages, a head: [B, 2, 6, 6] to 3 logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.layer1, self.layer2 = Block(4, 4), Block(4, 8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(torch.tanh(self.stem(x)))).mean(dim=(2, 3)))


@pytest.fixture(scope="session")
def make_network():
    """Make the same network every time, in float64 unless asked otherwise."""

    def make(dtype=torch.float64, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Network().to(dtype)

    return make


@pytest.fixture(scope="session")
def make_batches():
    """Make the same batches every time."""

    def make(count, size=8, dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        shape = (size, 2, 6, 6)
        return [
            (
                torch.randn(shape, generator=generator, dtype=dtype),
                torch.randint(3, (size,), generator=generator),
            )
            for _ in range(count)
        ]

    return make
