"""The whole training step of a ResNet-20 with one correction, over the plain step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import regrad
import torch
from regrad_runner.models.building import build_model
from torch import nn
from torch.nn import functional as F

from regrad_bench.cases import Attached, Case, Pair, Setting

BATCH = 128
IMAGE = 32
CLASSES = 10
# What the project set itself, as largest ratios to the plain step; not every correction has one.
GOALS = {"powergrad": 1.01, "gcode": 1.35} | dict.fromkeys(
    ("xgrad", "agc", "centralization", "adanorm", "gcw"), 1.05
)


def step_cases() -> list[Case]:
    """Return one case for each installed correction, and one for an attachment without any."""
    bare = Case(
        name="step/none",
        ours="an attachment without corrections",
        peer="plain step",
        build=_build(),
        goal=None,
    )
    return [bare, *(_case(name) for name in regrad.available())]


def _case(name: str) -> Case:
    return Case(
        name=f"step/{name}",
        ours=f"ResNet-20 step with {name}",
        peer="plain step",
        build=_build(name),
        goal=GOALS.get(name),
    )


def _build(*corrections: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        ours, peer = Trainer(setting), Trainer(setting)
        attached = Attached(ours.model, ours.optimizer, [*corrections], F.cross_entropy)
        ours.criterion = attached.attachment.criterion
        return Pair(
            ours=ours.step,
            peer=peer.step,
            prepare=attached.pass_the_meter,
            close=attached.attachment.detach,
        )

    return build


class Trainer:
    """A ResNet-20 on one batch of noise, SGD with momentum.

    Args:
        setting: `quick` makes it a ResNet-8 on 8 × 8 pixels.

    Attributes:
        criterion: What the step calls as its loss.
    """

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        size, batch = (8, 4) if setting.quick else (IMAGE, BATCH)
        name = "resnet8" if setting.quick else "resnet20"
        self.model: nn.Module = build_model(name, classes=CLASSES, image_size=size).to(
            setting.device
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = torch.randn(batch, 3, size, size, generator=generator).to(setting.device)
        self.labels = torch.randint(CLASSES, (batch,), generator=generator).to(setting.device)
        self.criterion: Callable[..., torch.Tensor] = F.cross_entropy

    def step(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        loss: Any = self.criterion(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
