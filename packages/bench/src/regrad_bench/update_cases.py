"""Steps that are corrected as a whole, beside the step alone and beside a peer's optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.optim.adamw import AdamWLegacy
from torch import Tensor
from torch.optim import AdamW, Optimizer

from regrad_bench.alone_cases import BETAS
from regrad_bench.cases import Attached, Case, Pair, Setting
from regrad_bench.tensors import Gradients, largest_difference, resnet50_gradients

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
    corrected = resnet50_gradients(setting.device, quick=setting.quick)
    others = resnet50_gradients(setting.device, quick=setting.quick)
    optimizer = _fused(corrected.parameters)
    peer = make_peer(others.parameters)
    attached = Attached(corrected.model, optimizer, [spec])
    sides = (corrected, others)
    calls = 0

    def prepare() -> None:
        nonlocal calls
        calls += 1
        for side in sides:
            _turn(side, is_turned=calls % PERIOD == 0)
        attached.engine.before_forward(corrected.model)
        attached.pass_the_meter()

    def difference() -> float:
        for _ in range(PERIOD):
            prepare()
            ours = _displacements(corrected, optimizer)
            theirs = _displacements(others, peer)
        return largest_difference(ours, theirs)

    return Pair(
        ours=optimizer.step,
        peer=peer.step,
        prepare=prepare,
        difference=difference if is_equal else None,
        close=attached.attachment.detach,
    )


def _turn(side: Gradients, *, is_turned: bool) -> None:
    """Restore the gradients, or turn the sign of every second row."""
    side.refill()
    if is_turned:
        torch._foreach_neg_([gradient[::2] for gradient in side.gradients])


def _displacements(side: Gradients, optimizer: Optimizer) -> list[Tensor]:
    """Take a step and return what it added to each parameter."""
    before = [parameter.detach().clone() for parameter in side.parameters]
    optimizer.step()
    return list(torch._foreach_sub([p.detach() for p in side.parameters], before))
