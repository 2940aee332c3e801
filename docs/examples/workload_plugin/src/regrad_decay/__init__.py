"""A workload of its own: how old a sample is, from noisy counts of its decays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from regrad_runner.workloads.samples import TensorSamples
from regrad_runner.workloads.workload import Defaults, Measure, Workload
from torch import Tensor, nn

OLDEST, COUNTS = (
    2.5,
    1000,
)  # in mean lifetimes (of radiocarbon 8,267 years); decays counted of a fresh sample
SIZES = {"train": 600, "validation": 200, "test": 200}


def load(
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    detectors: int = 4,
) -> DecayWorkload:
    """Return samples of up to 2.5 mean lifetimes, whose decays several detectors count.

    Args:
        seed_of_split: Fixes every sample, at least 0.
        data_dir: Must be None: the samples are drawn.
        train_size: Number of training samples, 1 to 600; None for all.
        detectors: How many detectors count, at least 1.

    Raises:
        ValueError: If a folder is given or a number is out of its range.
    """
    if data_dir is not None:
        raise ValueError(f"data_dir must be left out for workload 'decay', got '{data_dir}'")
    if detectors < 1:
        raise ValueError(f"detectors must be at least 1, got {detectors!r}")
    if train_size is not None and not 1 <= train_size <= SIZES["train"]:
        raise ValueError(f"train_size must be from 1 to {SIZES['train']}, got {train_size!r}")
    generator = torch.Generator().manual_seed(seed_of_split)
    age = OLDEST * torch.rand(sum(SIZES.values()), 1, generator=generator)
    seen = torch.poisson(
        COUNTS * torch.exp(-age) * torch.linspace(0.1, 1.0, detectors), generator=generator
    )
    sizes = list(SIZES.values())
    parts = zip((seen.log1p() - 5).split(sizes), age.split(sizes), strict=True)
    train, validation, test = (TensorSamples(inputs, targets) for inputs, targets in parts)
    return DecayWorkload(
        name="decay",
        measure=Measure(name="test squared error", higher_is_better=False, target=0.02, decimals=5),
        train=TensorSamples(train.inputs[:train_size], train.targets[:train_size]),
        validation=validation,
        test=test,
        detectors=detectors,
        defaults=Defaults(epochs=10, batch_size=50, optimizer="adam", lr=0.01, model="mlp"),
    )


@dataclass(frozen=True, kw_only=True)
class DecayWorkload(Workload):
    """Counts, a small network, the squared error of the age in lifetimes.

    Attributes:
        detectors: Inputs of the network.
    """

    detectors: int

    def build_model(
        self, name: str, *, width: int = 32, layers: int = 1, seed: int = 0
    ) -> nn.Module:
        """Return a network with hidden layers, as `--model mlp:layers=2 --width 16` asks for."""
        if name != "mlp":
            raise ValueError(f"no model named {name!r} for workload 'decay'; there is mlp")
        sizes = [self.detectors, *[width] * layers]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed every device's generator as well.
            torch.default_generator.manual_seed(seed)
            parts: list[nn.Module] = []
            for before, after in pairwise(sizes):
                parts += [nn.Linear(before, after), nn.Tanh()]
            return nn.Sequential(*parts, nn.Linear(sizes[-1], 1))

    def model_settings(self, name: str) -> dict[str, int]:
        """Return the width that a model has unless told otherwise."""
        return {"width": 32}

    def criterion(self) -> nn.Module:
        """Return the mean squared error."""
        return nn.MSELoss()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's squared error, each counting once."""
        errors = (outputs - targets).square().squeeze(1)
        return errors, torch.ones_like(errors)
