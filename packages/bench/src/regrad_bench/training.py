"""Small models on one batch of noise, for cases that time a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from regrad_runner.models.building import build_model
from regrad_runner.models.gpt import build_gpt
from torch import Tensor, nn
from torch.nn import functional as F

from regrad_bench.cases import Setting

CLASSES = 10
VOCABULARY = 256


class Task(NamedTuple):
    """A model and one batch for it.

    Attributes:
        model: Gives logits [B, C] or [B, C, T].
        inputs: What it is called with, shape [B, *].
        targets: Class indices, shape [B] or [B, T].
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def resnet20(setting: Setting) -> Task:
    """Return a ResNet-20 and 128 images of 32 × 32 pixels; with `quick` a ResNet-8 and 4 of 8."""
    size, batch = (8, 4) if setting.quick else (32, 128)
    name = "resnet8" if setting.quick else "resnet20"
    return _on_images(build_model(name, classes=CLASSES, image_size=size), size, batch)


def vit_tiny(setting: Setting) -> Task:
    """Return a ViT-tiny (12 blocks, 192 wide) and 16 images of 32 × 32 pixels, 64 patches each."""
    # Heavy to import, and other models do not need it.
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    size, batch = (8, 2) if setting.quick else (32, 16)
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(
            img_size=size,
            patch_size=4,
            embed_dim=24 if setting.quick else 192,
            depth=1 if setting.quick else 12,
            num_heads=3,
            num_classes=CLASSES,
        )
    return _on_images(model, size, batch)


def small_gpt(setting: Setting) -> Task:
    """Return a GPT (4 blocks, 128 wide) and 16 texts of 64 bytes."""
    length, batch = (8, 2) if setting.quick else (64, 16)
    width, layers = (16, 1) if setting.quick else (128, 4)
    model = build_gpt(vocabulary=VOCABULARY, context=length, width=width, layers=layers)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
    return Task(model, tokens[:, :-1], tokens[:, 1:])


def _on_images(model: nn.Module, size: int, batch: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return Task(model, images, torch.randint(CLASSES, (batch,), generator=generator))


class Trainer:
    """A model trained on one batch by SGD with momentum.

    Args:
        task: The model and its batch.
        device: Where they go.

    Attributes:
        model: The model; what the step calls may be a wrapper that was put in its place.
        criterion: What the step calls as its loss.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.model = task.model.to(device)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9
        )
        self.inputs = task.inputs.to(device)
        self.targets = task.targets.to(device)
        self.criterion: Callable[..., Tensor] = F.cross_entropy

    def step(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        loss: Any = self.criterion(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()
