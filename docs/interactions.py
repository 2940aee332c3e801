"""Write the page on pairs of corrections, from what happens when both are really attached.

Usage: python docs/interactions.py [--check]
With --check nothing is written, and a stale page is an error.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import regrad
import torch
from corrections_table import cards
from regrad.order import resolve_order
from regrad.registry import create_all
from regrad_runner.models.building import build_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

PAGE = Path(__file__).parent / "interactions.md"
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD with momentum": lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9),
    "AdamW": lambda parameters, lr: AdamW(parameters, lr=lr),
}
# Of these the optimizer reads, or does, something that the order of two corrections can change.
MEASURED = ("gradient", "moment", "update")
IN_TIME = ("weights", "criterion", "hidden", "gradient", "moment", "update")
# By their defaults these do nothing here: the network has one exit, and AdamW's steps are short.
# And AdaFisher refuses AdamW, whatever else is attached.
TRIED = {
    "adafisher": "adafisher:allow_adaptive=true",
    "boosted": "boosted:alpha=0.25",
    "clip-update": "clip-update:max_rms=0.01",
}
STEPS, BEFORE_MEASURING = 32, 16  # GC-W waits for ten steps and fits after ten more
ROUNDING = 1e-12
BEGIN, END = "<!-- pairs: written by docs/interactions.py -->\n", "<!-- end of pairs -->"


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What comes of two corrections on one optimizer.

    Attributes:
        pair: Their names.
        optimizer: Its kind.
        verdict: "ok", "ordered" or "refused".
        first: Name of the one that a declaration puts first, or "".
        reason: Why they are ordered or refused, in the words of the core.
        stages: The stages in which each of `pair` acted, in time order; none where refused.
        commutator: Size of what the order changes; None where time decides it.
    """

    pair: tuple[str, str]
    optimizer: str
    verdict: str
    first: str = ""
    reason: str = ""
    stages: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    commutator: float | None = None

    @property
    def shared(self) -> tuple[str, ...]:
        """Stages in which both act."""
        return tuple(stage for stage in self.stages[0] if stage in self.stages[1])

    def in_words(self) -> str:
        """Say the verdict, and why."""
        if self.verdict == "refused":
            return f"refused: {self.reason}"
        if self.verdict == "ordered":
            return f"ordered, `{self.first}` first: {self.reason}"
        if self.shared:
            return f"ok, in the order of the list ({', '.join(self.shared)})"
        acts = []
        for name, stages in zip(self.pair, self.stages, strict=True):
            acts += [(stage, name) for stage in stages]
        acts.sort(key=lambda act: IN_TIME.index(act[0]))
        return "ok, different stages: " + ", then ".join(
            f"`{name}` ({stage})" for stage, name in acts
        )

    def row(self) -> str:
        """Return one line of the table."""
        size = "different stages" if self.verdict == "ok" and not self.shared else ""
        if self.commutator is not None:
            size = "0" if self.commutator < ROUNDING else f"{self.commutator:.1e}"
        names = ", ".join(f"`{name}`" for name in self.pair)
        return f"| {names} | {self.optimizer} | {self.in_words()} | {size} |\n"


def shipped() -> list[str]:
    """Return the names of the corrections that have a card in this repository."""
    here = cards()
    return [name for name, entry in regrad.available().items() if entry.distribution in here]


def made(names: Sequence[str]) -> list[regrad.Correction]:
    """Return fresh corrections, the parts where a name is a composition's."""
    return create_all(tried(names))


def tried(names: Sequence[str]) -> list[str]:
    """Return the names, with options where a correction does nothing here without."""
    return [TRIED.get(name, name) for name in names]


def network(*, scale: float = 1.0) -> nn.Module:
    """Return the model that corrections are tried on, its weights larger by a factor."""
    model = build_model(
        "resnet8", classes=5, channels=2, image_size=8, width=4, norm="group", seed=0
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@cache
def samples() -> tuple[Tensor, Tensor]:
    """Return images and labels of eight batches."""
    generator = torch.Generator().manual_seed(1)
    # More than the ten rows that a sample of rows keeps at least.
    images = torch.randn(8, 12, 2, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (8, 12), generator=generator)


@cache
def reference_gradients() -> list[list[Tensor]]:
    """Return the gradients of every step, with means and sizes that give every rule a case."""
    generator = torch.Generator().manual_seed(2)
    shapes = [p.shape for p in network().parameters()]

    def drawn(shape: torch.Size) -> Tensor:
        mean, rest = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in (shape[:1], shape)
        )
        return rest + mean.reshape(-1, *[1] * (len(shape) - 1))

    sizes = 0.5 * torch.randn(STEPS, generator=generator, dtype=torch.float64).exp()
    return [[size * drawn(shape) for shape in shapes] for size in sizes]


def stages_of(pair: tuple[str, str], optimizer: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Train with both, and return in which stages each really acted."""
    model = network()
    rule = OPTIMIZERS[optimizer](model.parameters(), lr=1e-3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    with regrad.attach(model, rule, tried(pair), loss) as attachment:
        for step in range(STEPS):
            images, labels = (batches[step % 8] for batches in samples())
            attachment.criterion(model(images), labels).backward()  # type: ignore[no-untyped-call]
            rule.step()
            rule.zero_grad()
        seen = attachment.engine.meter.effects()
    acted = {
        name: {s for s, effect in stages.items() if effect["share_touched"]}
        for name, stages in seen.items()
    }
    parts = [[correction.name for correction in made([name])] for name in pair]
    found = [set().union(*(acted.get(name, set()) for name in names)) for names in parts]
    one, other = (tuple(stage for stage in IN_TIME if stage in stages) for stages in found)
    return one, other


def read_by_the_optimizer(
    corrections: Sequence[regrad.Correction],
    optimizer: str,
    gradients: Sequence[Sequence[Tensor]],
    *,
    rate: float = 0.0,
) -> list[dict[str, list[Tensor]]]:
    """Return, for every step of given gradients, the corrected ones, and what the step did."""
    model = network(
        scale=100.0
    )  # bounds that are relative to weights are then reached now and then
    rule, seen = OPTIMIZERS[optimizer](model.parameters(), lr=rate), []
    with regrad.attach(model, rule, corrections, nn.CrossEntropyLoss()):
        for step in gradients:
            images, labels = (batches[0] for batches in samples())
            # What a correction reads in the modules it reads here; the gradients are then given.
            rule.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter, gradient in zip(model.parameters(), step, strict=True):
                parameter.grad = gradient.clone()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            rule.step()
            moments = []
            for parameter in model.parameters():
                states = rule.state[parameter].values()
                moments += [s.clone() for s in states if isinstance(s, Tensor) and s.dim()]
            seen.append(
                {
                    "gradient": [p.grad for p in model.parameters() if p.grad is not None],
                    "moment": moments,
                    "update": [
                        parameter.detach() - old
                        for parameter, old in zip(model.parameters(), before, strict=True)
                    ],
                }
            )
    return seen


def commutator_of(first: str, second: str, optimizer: str, stage: str) -> float:
    """Return |AB - BA| / |AB| of what the optimizer reads or does, A being `first`."""
    results = []
    rate = 1.0 if stage == "update" else 0.0
    for names in ((first, second), (second, first)):
        corrections = made(names)
        for correction in corrections:
            correction.needs = replace(correction.needs, before=(), after=())
        steps = read_by_the_optimizer(corrections, optimizer, reference_gradients(), rate=rate)
        tensors = chain.from_iterable(step[stage] for step in steps[BEFORE_MEASURING:])
        results.append(torch.cat([tensor.flatten() for tensor in tensors]))
    share: float = ((results[0] - results[1]).norm() / results[0].norm()).item()
    return share


def interaction_of(pair: tuple[str, str], optimizer: str) -> Interaction:
    """Attach both in both orders, and tell what comes of it."""
    try:
        for given in (pair, pair[::-1]):
            model = network()
            rule = OPTIMIZERS[optimizer](model.parameters(), lr=0.1)
            regrad.attach(model, rule, tried(given), nn.CrossEntropyLoss()).detach()
    except regrad.RegradError as refusal:
        reason = str(refusal).partition("cannot work together: ")[2] or str(refusal)
        return Interaction(pair=pair, optimizer=optimizer, verdict="refused", reason=reason)
    stages = stages_of(pair, optimizer)
    if not all(stages):  # one may leave the other nothing to do: a norm of 1 has no element above 1
        stages = stages_of(pair[::-1], optimizer)[::-1]
    found = Interaction(pair=pair, optimizer=optimizer, verdict="ok", stages=stages)
    measured = [stage for stage in found.shared if stage in MEASURED]
    if not measured:
        return found
    moved = {given: resolve_order(made(given))[1] for given in (pair, pair[::-1])}
    for given, reasons in moved.items():
        if reasons:
            why = "; ".join(reason.partition(": ")[2] for reason in reasons)
            found = replace(found, verdict="ordered", first=given[1], reason=why)
    first = found.first or pair[0]
    second = pair[1 - pair.index(first)]
    return replace(found, commutator=commutator_of(first, second, optimizer, measured[0]))


def interactions() -> list[Interaction]:
    """Return every pair on every optimizer."""
    found = []
    for pair in combinations(shipped(), 2):
        found += [interaction_of(pair, optimizer) for optimizer in OPTIMIZERS]
    return found


def table(found: Sequence[Interaction]) -> str:
    """Return a row per pair, and one per optimizer where they differ."""
    rows = ["| corrections | optimizer | verdict | commutator |\n| --- | --- | --- | --- |\n"]
    for pair in dict.fromkeys(interaction.pair for interaction in found):
        each = [interaction for interaction in found if interaction.pair == pair]
        alike = {replace(interaction, optimizer="both").row() for interaction in each}
        rows += alike if len(alike) == 1 else [interaction.row() for interaction in each]
    return "".join(rows)


def page(found: Sequence[Interaction]) -> str:
    """Return the page with a fresh table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}{table(found)}{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    """Write the page anew, or say that it should be."""
    new = page(interactions())
    if "--check" not in arguments:
        PAGE.write_text(new, encoding="utf-8")
    elif new != PAGE.read_text(encoding="utf-8"):
        sys.stderr.write("docs/interactions.md is stale; run python docs/interactions.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
