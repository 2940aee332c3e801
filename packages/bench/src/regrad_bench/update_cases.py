"""Steps that are corrected as a whole, beside the step alone and beside a peer's optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.optim.adamw import AdamWLegacy
from torch import Tensor
from torch.optim import AdamW, Optimizer

from regrad_bench.alone_cases import BETAS
from regrad_bench.cases import Attached, Case, Pair, Setting
from regrad_bench.tensors import largest_difference, resnet50_gradients

SPECS = {
    "cautious": "cautious",
    "clip-update": "clip-update",
    "centralization": "centralization:placement=update",
}
RATE = 1e-3
# Gradients keep their signs for two steps and are turned for one: the average of a step does not
# follow, so that elements disagree with it.
PERIOD = 3


def update_cases() -> list[Case]:
    """Return a case for each correction of the update, and one beside timm's cautious AdamW."""
    beside_the_step = [
        Case(
            name=f"update/{name}",
            ours=f"AdamW step, fused, with {spec}",
            peer="AdamW step, fused",
            build=_beside_the_step(spec),
        )
        for name, spec in SPECS.items()
    ]
    beside_timm = Case(
        name="update/cautious-timm",
        ours="AdamW step, fused, with cautious",
        peer="timm's cautious AdamW step",
        build=_cautious_beside_timm,
    )
    return [*beside_the_step, beside_timm]


def _beside_the_step(spec: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        return _pair(setting, spec, _fused)

    return build


def _cautious_beside_timm(setting: Setting) -> Pair:
    return _pair(setting, "cautious", _cautious_of_timm, is_equal=True)


def _fused(parameters: list[torch.nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)


def _cautious_of_timm(parameters: list[torch.nn.Parameter]) -> Optimizer:
    optimizer: Optimizer = AdamWLegacy(
        parameters, lr=RATE, betas=BETAS, weight_decay=0.0, caution=True
    )
    return optimizer


def _pair(
    setting: Setting,
    spec: str,
    make_peer: Callable[[list[torch.nn.Parameter]], Optimizer],
    *,
    is_equal: bool = False,
) -> Pair:
    """Return a corrected step and a peer's, on weights and gradients of their own that are equal.

    Args:
        setting: Device and size.
        spec: The correction, as for `regrad.attach`.
        make_peer: Makes the peer's optimizer.
        is_equal: Whether both should move the weights alike.
    """
    corrected = _Side(setting, _fused)
    others = _Side(setting, make_peer)
    attached = Attached(corrected.weights.model, corrected.optimizer, [spec])

    def prepare() -> None:
        corrected.turn()
        others.turn()
        attached.engine.before_forward(corrected.weights.model)
        attached.pass_the_meter()

    def difference() -> float:
        # Through a whole period: in one of its steps elements disagree.
        for _ in range(PERIOD):
            prepare()
            ours = corrected.displacements()
            theirs = others.displacements()
        return largest_difference(ours, theirs)

    return Pair(
        ours=corrected.step,
        peer=others.step,
        prepare=prepare,
        difference=difference if is_equal else None,
        close=attached.attachment.detach,
    )


class _Side:
    """Weights, their gradients, and an optimizer that has stepped some times.

    Args:
        setting: Device and size.
        make: Makes the optimizer.
    """

    def __init__(
        self, setting: Setting, make: Callable[[list[torch.nn.Parameter]], Optimizer]
    ) -> None:
        self.weights = resnet50_gradients(setting.device, quick=setting.quick)
        self.optimizer = make(self.weights.parameters)
        self._steps = 0

    def turn(self) -> None:
        """Restore the gradients; before the last step of a period turn every second row."""
        self.weights.refill()
        if self._steps % PERIOD == PERIOD - 1:
            torch._foreach_neg_([gradient[::2] for gradient in self.weights.gradients])

    def step(self) -> None:
        """Take a step."""
        self.optimizer.step()
        self._steps += 1

    def displacements(self) -> list[Tensor]:
        """Take a step and return what it added to each parameter."""
        before = [parameter.detach().clone() for parameter in self.weights.parameters]
        self.step()
        return list(torch._foreach_sub([p.detach() for p in self.weights.parameters], before))
