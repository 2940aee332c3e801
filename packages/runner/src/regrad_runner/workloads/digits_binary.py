"""The handwritten digits, and a network whose convolutions are binary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from regrad.correction import did_you_mean
from torch import Tensor, nn

from regrad_runner.models.binary import (
    BINARY_WIDTH,
    Estimator,
    binary_layers,
    binary_network,
)
from regrad_runner.models.residual import Norm
from regrad_runner.workloads import digits
from regrad_runner.workloads.images import ImageWorkload
from regrad_runner.workloads.workload import Defaults

BINARY_MODEL = "binary-cnn"
BINARY_DEFAULTS = Defaults(
    epochs=20,
    batch_size=32,
    optimizer="adam",
    lr=1e-2,
    model=BINARY_MODEL,
    evaluations_per_epoch=1,
)


def load(
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    two_steps: bool = False,
) -> BinaryImageWorkload:
    """Return the images of `regrad_runner.workloads.digits`, for a binary network.

    Unless told otherwise latent weights are trained with Adam. An optimizer whose parameter groups
    have an option `binary`, as Bop, is given signs.

    Args:
        seed_of_split: As for the digits.
        data_dir: Must be None: the digits need no folder.
        train_size: As for the digits.
        two_steps: Whether the first half of a run trains real weights behind binary inputs, and
            the second half goes on from their signs; each half has the whole schedule of the
            learning rate.

    Raises:
        ValueError: If a folder is given, or `train_size` is out of its range.

    References:
        Liu, Shen, Li, Helwegen, Huang and Cheng, 2021, "How Do Adam and Training Strategies Help
        BNNs Optimization?", section 5, for the two steps. Theirs decays the real weights of the
        first step and none of the second; ours has the optimizer's decay in both.
    """
    plain = digits.load(seed_of_split=seed_of_split, data_dir=data_dir, train_size=train_size)
    same = {field.name: getattr(plain, field.name) for field in fields(plain)}
    changed = {"name": "digits-binary", "defaults": BINARY_DEFAULTS, "parts": 2 if two_steps else 1}
    return BinaryImageWorkload(**{**same, **changed})


@dataclass(frozen=True, kw_only=True)
class BinaryImageWorkload(ImageWorkload):
    """Labelled images and a binary network.

    With `parts=2` the weights are real in the first of them.
    """

    def build_model(
        self,
        name: str,
        *,
        width: int | None = None,
        norm: Norm = "batch",
        estimator: Estimator = "straight-through",
        scaled: bool = False,
        seed: int = 0,
    ) -> nn.Module:
        """Return a binary network: see `regrad_runner.models.binary.binary_network`."""
        if name != BINARY_MODEL:
            raise ValueError(
                f"no model named {name!r} for workload {self.name!r}; "
                f"there is {BINARY_MODEL}{did_you_mean(name, [BINARY_MODEL])}"
            )
        if norm != "batch":
            raise ValueError(f"norm must be 'batch' for model {name!r}, got {norm!r}")
        return binary_network(
            classes=self.classes,
            channels=self.train.channels,
            width=BINARY_WIDTH if width is None else width,
            estimator=estimator,
            scaled=scaled,
            seed=seed,
        )

    def model_settings(self, name: str) -> Mapping[str, Any]:
        """Return width and normalisation that the model has unless told otherwise."""
        return {"norm": "batch", "width": BINARY_WIDTH}

    def binary_parameters(self, model: nn.Module) -> list[Tensor]:
        """Return the weights of the binary layers."""
        return [layer.weight for layer in binary_layers(model)]

    def begin_step(self, model: nn.Module, part: int) -> None:
        """Let weights be real in all parts of a run but the last."""
        for layer in binary_layers(model):
            layer.real_weights = part < self.parts - 1
