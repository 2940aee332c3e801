"""How the cost of corrections grows with the parameters, and with the number of corrections."""

from __future__ import annotations

from collections.abc import Callable

import regrad
import torch
from regrad import Correction
from regrad.correction import Needs
from regrad.hookspecs import Step
from torch.optim import SGD

from regrad_bench.cases import Attached, Case, Pair, Setting
from regrad_bench.tensors import Gradients, square_layers

SMALL = 1  # million parameters
LARGE = 300
MANY = 8  # corrections
GOAL = 1.3


def growth_cases() -> list[Case]:
    """Return one case for each installed correction, and one for many corrections at once."""
    sizes = [
        Case(
            name=f"growth/{name}",
            ours=f"{name}, 300 M parameters",
            peer="1 M parameters",
            build=_sizes(name),
            goal=GOAL,
            scale=LARGE / SMALL,
            most_pairs=9,
        )
        for name in regrad.available()
    ]
    many = Case(
        name=f"growth/{MANY}-corrections",
        ours=f"{MANY} corrections that read one number",
        peer="one of them",
        build=_many,
        scale=MANY,
        repeats=100,
        host_only=True,
    )
    return [*sizes, many]


def _sizes(name: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        made = regrad.create(name)
        parts = made if isinstance(made, tuple) else (made,)
        if any({"hidden", "criterion"} & set(part.needs.stages) for part in parts):
            raise ValueError("its cost depends on activations or logits, not on parameters")
        large_layers, small_layers = (
            square_layers(millions, setting.device, quick=setting.quick)
            for millions in (LARGE, SMALL)
        )
        large = _attached(name, large_layers, setting)
        small = _attached(name, small_layers, setting)

        def prepare() -> None:
            large_layers.refill()
            small_layers.refill()  # the last, so that the small side finds it in the cache
            large.pass_the_meter()
            small.pass_the_meter()

        def close() -> None:
            large.attachment.detach()
            small.attachment.detach()

        return Pair(ours=large.correct, peer=small.correct, prepare=prepare, close=close)

    return build


def _attached(name: str, layers: Gradients, setting: Setting) -> Attached:
    """Return a correction on these layers, after one step that made its state."""
    optimizer = SGD(layers.parameters, lr=1e-6, momentum=0.9)
    optimizer.step()
    attached = Attached(layers.model, optimizer, [name])
    width = layers.parameters[0].shape[1]
    # Some corrections read their choices from a forward pass.
    layers.model(torch.zeros(1, width, device=setting.device))
    return attached


class Reader(Correction):
    """Reads the number of gradients and changes nothing: its cost is that of the call."""

    name = "reader"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step: Step) -> None:
        """Count the gradients."""
        self.seen = len(step.gradients)


def readers(number: int) -> list[Correction]:
    """Return so many corrections under different names."""
    classes = [
        type(f"Reader{index}", (Reader,), {"name": f"reader-{index}"}) for index in range(number)
    ]
    return [kind() for kind in classes]


def _many(setting: Setting) -> Pair:
    many, one = (_attached_readers(number, setting) for number in (MANY, 1))

    def prepare() -> None:
        many.pass_the_meter()
        one.pass_the_meter()

    return Pair(ours=many.correct, peer=one.correct, prepare=prepare)


def _attached_readers(number: int, setting: Setting) -> Attached:
    layers = square_layers(SMALL, setting.device, quick=setting.quick)
    return Attached(layers.model, SGD(layers.parameters, lr=0.1), list(readers(number)))
