"""Two gloo processes train as one: half of every batch each, under DDP and FSDP2."""

import regrad
import torch
from regrad.sharding import is_sharded
from regrad_testing import run_on_processes
from regrad_testing.layout_clauses import fsdp2
from regrad_xgrad import AdaM3
from torch.nn.parallel import DistributedDataParallel


class OtherLibrary(torch.optim.Adam):
    """Adam's numbers under another class."""


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam3": lambda p: AdaM3(p, lr=1e-3, weight_decay=0.1),
    "adam3-foreach": lambda p: AdaM3(p, lr=1e-3, foreach=True),
    "foreign": lambda p: OtherLibrary(p, lr=0.01),
}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            torch.nn.Linear(6, 10),
            torch.nn.GroupNorm(2, 10),
            torch.nn.Tanh(),
            torch.nn.Linear(10, 3),
        ]
        return torch.nn.Sequential(*layers).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        yield (
            torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )


def whole(parameter):
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def train(model, make_optimizer, part):
    optimizer = make_optimizer(model.parameters())
    with regrad.attach(model, optimizer, ["xgrad"]):
        for inputs, target in batches():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(inputs[part])
            model.train()
    return [whole(parameter) for parameter in model.parameters()]


def farthest(seen, wanted):
    pairs = zip(seen, wanted, strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def differences(rank):
    """Return how far both layouts end from one process, for each optimizer."""
    part = slice(4 * rank, 4 * rank + 4)
    seen = {}
    for name, make_optimizer in OPTIMIZERS.items():
        alone = train(make_model(), make_optimizer, slice(None))
        models = {
            "ddp": DistributedDataParallel(make_model()),
            "fsdp2": fsdp2(make_model()),
        }
        for layout, model in models.items():
            ends = train(model, make_optimizer, part)
            seen[f"{layout}-{name}"] = farthest(ends, alone)
    return seen


def test_two_processes_train_as_one_under_ddp_and_fsdp2():
    for seen in run_on_processes(differences):
        assert len(seen) == 10
        # float64: the mean of two half batches and of the whole round differently; AdaM3 steps further
        limits = {name: 1e-12 if "adam3" in name else 1e-14 for name in seen}
        assert all(difference < limits[name] for name, difference in seen.items()), seen
