"""Residual networks for small images.

Written by hand: torchvision has those for ImageNet only, with another stem and other widths.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]
BLOCKS_PER_STAGE = {f"resnet{6 * blocks + 2}": blocks for blocks in (1, 3, 5, 9)}
BLOCKS_BETWEEN_EXITS = {f"multiexit{6 * blocks + 2}": blocks for blocks in (1, 3, 5, 9)}
STAGES = 3
GROUPS = 8


def is_own(name: str) -> bool:
    """Say whether a name is that of a CIFAR residual network, whose width can be chosen."""
    return name in BLOCKS_PER_STAGE or name in BLOCKS_BETWEEN_EXITS


def residual_network(
    name: str, *, width: int, norm: Norm, classes: int, channels: int, image_size: int, seed: int
) -> nn.Module:
    """Return a residual network; `regrad_runner.models.building.build_model` says what it takes."""
    smallest = {"channels": (channels, 1), "image_size": (image_size, 4), "width": (width, 1)}
    for option, (value, least) in smallest.items():
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value!r}")
    # Modules draw their default weights when they are made; the fork puts the global state back.
    with torch.random.fork_rng(devices=[]):
        kind = MultiExitNetwork if name in BLOCKS_BETWEEN_EXITS else ResidualNetwork
        blocks = {**BLOCKS_PER_STAGE, **BLOCKS_BETWEEN_EXITS}[name]
        model = kind(blocks, classes=classes, channels=channels, width=width, norm=norm)
    _initialize(model, torch.Generator().manual_seed(seed))
    return model


class ResidualNetwork(nn.Module):
    """The network that `build_model` returns; `fc` is its output layer."""

    def __init__(self, blocks: int, *, classes: int, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, width, bias=norm == "none")
        self.norm = _norm(norm, width)
        self.stages = nn.Sequential()
        channels_in = width
        for index in range(STAGES):
            channels_out = width * 2**index
            stage = nn.Sequential()
            for block in range(blocks):
                halves = index > 0 and block == 0
                stage.append(
                    ResidualBlock(
                        channels_in,
                        channels_out,
                        stride=2 if halves else 1,
                        norm=norm,
                        depth=STAGES * blocks,
                    )
                )
                channels_in = channels_out
            self.stages.append(stage)
        self.fc = nn.Linear(channels_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, C, H, W]."""
        features = self.stages(torch.relu(self.norm(self.conv(images))))
        return self.fc(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class MultiExitNetwork(ResidualNetwork):
    """A residual network that answers after every stage; `heads` are its output layers.

    Attributes:
        exits: How many answers it returns.
    """

    def __init__(self, blocks: int, *, classes: int, channels: int, width: int, norm: Norm) -> None:
        super().__init__(blocks, classes=classes, channels=channels, width=width, norm=norm)
        del self.fc
        self.exits = STAGES
        self.heads = nn.ModuleList(
            nn.Linear(width * 2**index, classes) for index in range(self.exits)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the logits [B, classes] of every exit, in the order of their depth."""
        features = torch.relu(self.norm(self.conv(images)))
        logits: list[Tensor] = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = stage(features)
            logits.append(head(features.mean(dim=(2, 3))))
        return tuple(logits)

    @property
    def parts(self) -> list[tuple[nn.Module, ...]]:
        """What is computed for each exit beyond what the exit before it needs."""
        parts: list[tuple[nn.Module, ...]] = [*zip(self.stages, self.heads, strict=True)]
        return [(self.conv, *parts[0]), *parts[1:]]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside an identity shortcut, one of `depth` such blocks in a row."""

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int, norm: Norm, depth: int = 1
    ) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = _conv3x3(channels_in, channels_out, stride=stride, bias=bias)
        self.norm1 = _norm(norm, channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, bias=bias)
        self.norm2 = Scale(1 / math.sqrt(depth)) if norm == "none" else _norm(norm, channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, channels_out, H', W'] of features [B, channels_in, H, W].

        H' is ⌈H / stride⌉, and W' is ⌈W / stride⌉.
        """
        residual = torch.relu(self.norm1(self.conv1(images)))
        residual = self.norm2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(images))

    def shortcut(self, images: Tensor) -> Tensor:
        """Return every `stride`-th pixel, with zeros for the channels that are new (option A)."""
        if self.stride > 1:
            images = images[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            images = nn.functional.pad(images, (0, 0, 0, 0, 0, self.new_channels))
        return images


class Scale(nn.Module):
    """One learned factor, where a residual branch without normalisation ends."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of any shape times the factor."""
        return features * self.factor


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation with as many groups as divide the channels evenly, at most 8."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _conv3x3(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def _norm(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation of a layer."""
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return group_norm(channels)


@torch.no_grad()
def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw new weights from the generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResidualBlock) and isinstance(module.norm2, Scale):
            # No rectifier follows that would halve the second moment.
            module.conv2.weight.mul_(math.sqrt(0.5))
