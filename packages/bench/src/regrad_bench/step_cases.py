"""The whole training step of a model with corrections, over the plain step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import regrad
from regrad import RegradError
from torch.nn import functional as F

from regrad_bench.cases import Attached, Case, Pair, Setting
from regrad_bench.training import Task, Trainer, resnet20, small_gpt, vit_tiny

# What the project set itself, as largest ratios to the plain step of a ResNet-20; not every
# correction has one.
GOALS = {"powergrad": 1.01, "gcode": 1.35} | dict.fromkeys(
    ("xgrad", "agc", "centralization", "adanorm", "gcw"), 1.05
)
NUMBERS = (1, 2, 4, 8)  # of corrections at once


class Model(NamedTuple):
    """A model whose step is timed.

    Attributes:
        words: What it is called.
        task: Makes it, with its batch.
    """

    words: str
    task: Callable[[Setting], Task]


RESNET = Model("ResNet-20", resnet20)
TRANSFORMERS = {"vit": Model("ViT-tiny", vit_tiny), "gpt": Model("small GPT", small_gpt)}


def step_cases() -> list[Case]:
    """Return one case for each installed correction, and one for an attachment without any."""
    bare = Case(
        name="step/none",
        ours="an attachment without corrections",
        peer="plain step",
        build=_build(RESNET.task),
    )
    return [bare, *(_case("step", RESNET, name, GOALS.get(name)) for name in regrad.available())]


def transformer_cases() -> list[Case]:
    """Return one case for each installed correction on each transformer."""
    cases: list[Case] = []
    for section, model in TRANSFORMERS.items():
        cases += [_case(section, model, name, None) for name in regrad.available()]
    return cases


def together_cases() -> list[Case]:
    """Return cases of 1 to 8 corrections at once."""
    return [
        Case(
            name=f"together/{number}",
            ours=f"ResNet-20 step, corrections at once: {number}",
            peer="plain step",
            build=_build_together(number),
        )
        for number in NUMBERS
    ]


def memory_cases() -> list[Case]:
    """Return one case for each installed correction."""
    return [
        Case(
            name=f"memory/{name}",
            ours=f"ResNet-20 steps with {name}",
            peer="plain steps",
            build=_build_memory(name),
            only_memory=True,
        )
        for name in regrad.available()
    ]


def _case(section: str, model: Model, name: str, goal: float | None) -> Case:
    return Case(
        name=f"{section}/{name}",
        ours=f"{model.words} step with {name}",
        peer="plain step",
        build=_build(model.task, name),
        goal=goal,
    )


def _build(task: Callable[[Setting], Task], *corrections: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        ours = Trainer(task(setting), setting.device)
        peer = Trainer(task(setting), setting.device)
        attached = attach_to(ours, corrections)
        return Pair(
            ours=ours.step,
            peer=peer.step,
            prepare=attached.pass_the_meter,
            close=attached.attachment.detach,
        )

    return build


def attach_to(trainer: Trainer, corrections: Sequence[str]) -> Attached:
    """Attach corrections to a trainer, and let it call their criterion."""
    attached = Attached(trainer.model, trainer.optimizer, [*corrections], F.cross_entropy)
    trainer.criterion = attached.attachment.criterion
    return attached


def that_go_together(setting: Setting, number: int, *, layout: str = "plain") -> list[str]:
    """Return the first installed corrections, in order, that can be attached together.

    Args:
        setting: Where, and how large.
        number: How many.
        layout: One that each of them must support.

    Raises:
        ValueError: If there are fewer.
    """
    chosen: list[str] = []
    for name in regrad.available():
        if not _is_fit_for(name, layout):
            continue
        if len(chosen) < number and _goes_with(setting, [*chosen, name]):
            chosen.append(name)
    if len(chosen) < number:
        raise ValueError(
            f"{number} corrections that can be attached together must be installed; there are "
            f"{len(chosen)}: {', '.join(chosen)}"
        )
    return chosen


def _is_fit_for(name: str, layout: str) -> bool:
    """Say whether every part of a correction supports a layout."""
    made = regrad.create(name)
    parts = made if isinstance(made, tuple) else (made,)
    return all(layout in part.needs.layouts for part in parts)


def _goes_with(setting: Setting, corrections: list[str]) -> bool:
    """Say whether attach takes these corrections."""
    trainer = Trainer(resnet20(setting), setting.device)
    try:
        attached = attach_to(trainer, corrections)
    except (ValueError, RegradError):
        return False
    attached.attachment.detach()
    return True


def _build_together(number: int) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        return _build(resnet20, *that_go_together(setting, number))(setting)

    return build


def _build_memory(name: str) -> Callable[[Setting], Pair]:
    """Build the model inside each call: its weights and states are part of what is held."""

    def build(setting: Setting) -> Pair:
        def steps(corrections: Sequence[str]) -> None:
            trainer = Trainer(resnet20(setting), setting.device)
            attached = attach_to(trainer, corrections) if corrections else None
            for _ in range(2):  # the first makes the optimizer's state
                trainer.step()
            if attached is not None:
                attached.attachment.detach()

        return Pair(ours=lambda: steps([name]), peer=lambda: steps([]))

    return build
