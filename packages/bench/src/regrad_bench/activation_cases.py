"""The peak memory of one training step of a GPT, over that of the plain step."""

from __future__ import annotations

from collections.abc import Callable

from regrad_bench.cases import Case, Pair, Setting
from regrad_bench.step_cases import attach_to
from regrad_bench.training import Trainer, small_gpt

SHORT_FORMS = ("int8-rows", "uniform-rows", "wta-crs")
"""Corrections that keep less for backward."""


def activation_cases() -> list[Case]:
    """Return one case for each of them, and one for activation checkpointing."""
    cases = [_case(name, f"with {name}", _step_with(name)) for name in SHORT_FORMS]
    words = "with activation checkpointing of every block"
    return [*cases, _case("checkpointing", words, _checkpointed_step)]


def _case(name: str, words: str, make_step: Callable[[Setting], Callable[[], None]]) -> Case:
    """Return a case whose two sides are one step each, of trainings that have begun."""

    def build(setting: Setting) -> Pair:
        peer = Trainer(small_gpt(setting), setting.device)
        peer.step()
        return Pair(ours=make_step(setting), peer=peer.step)

    return Case(
        name=f"activations/{name}",
        ours=f"one step of a small GPT {words}",
        peer="one plain step",
        build=build,
        only_memory=True,
    )


def _step_with(name: str) -> Callable[[Setting], Callable[[], None]]:
    """Return what makes the step with a correction."""

    def make_step(setting: Setting) -> Callable[[], None]:
        trainer = Trainer(small_gpt(setting), setting.device)
        attached = attach_to(trainer, [name])
        trainer.step()
        attached.pass_the_meter()
        return trainer.step

    return make_step


def _checkpointed_step(setting: Setting) -> Callable[[], None]:
    """Return a step in which every block runs again in backward."""
    # Loads torch's distributed package, which no other case of one process needs.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: PLC0415
        checkpoint_wrapper,
    )

    task = small_gpt(setting)
    blocks = task.model.get_submodule("blocks")
    for name, block in [*blocks.named_children()]:
        blocks.add_module(name, checkpoint_wrapper(block))
    trainer = Trainer(task, setting.device)
    trainer.step()
    return trainer.step
