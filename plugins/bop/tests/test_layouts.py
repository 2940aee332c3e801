"""Two gloo processes train as one: half of every batch each, under DDP and FSDP2."""

import pytest
import torch
from regrad.sharding import is_sharded
from regrad_bop import Bop, Bop2, binarise_
from regrad_testing import run_on_processes
from regrad_testing.layout_clauses import fsdp2, fsdp2_by_columns
from torch.nn.parallel import DistributedDataParallel

OPTIMIZERS = {
    "bop": lambda groups: Bop(groups, lr=0.2, threshold=1e-3),
    "bop2": lambda groups: Bop2(groups, lr=0.2, threshold=0.1, second_rate=0.05),
}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            torch.nn.Linear(6, 8),
            torch.nn.Tanh(),
            torch.nn.Linear(8, 8, bias=False),
            torch.nn.Tanh(),
            torch.nn.Linear(8, 3),
        ]
        model = torch.nn.Sequential(*layers).double()
    binarise_(model[2])
    return model


def whole(parameter):
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def train(model, make_optimizer, part):
    binary = [p for name, p in model.named_parameters() if name.endswith("2.weight")]
    real = [p for name, p in model.named_parameters() if not name.endswith("2.weight")]
    optimizer = make_optimizer([{"params": binary, "binary": True}, {"params": real}])
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
        optimizer.step()
    return [whole(parameter).detach() for parameter in model.parameters()]


def differences(rank):
    """Return how far every layout ends from one process, and how many weights one has flipped."""
    part = slice(4 * rank, 4 * rank + 4)
    seen = {}
    for name, make_optimizer in OPTIMIZERS.items():
        alone = train(make_model(), make_optimizer, slice(None))
        seen[f"{name} flips"] = int((alone[2] != make_model()[2].weight).sum())
        models = {
            "ddp": DistributedDataParallel(make_model()),
            "rows": fsdp2(make_model()),
            "columns": fsdp2_by_columns(make_model()),
        }
        for layout, model in models.items():
            got = train(model, make_optimizer, part)
            far = [(a - b).abs().max().item() for a, b in zip(got, alone, strict=True)]
            seen[f"{name} {layout}"] = max(far)
    return seen


@pytest.mark.long
def test_two_processes_train_as_one_under_ddp_and_fsdp2():
    for seen in run_on_processes(differences):
        assert len(seen) == 8
        for name, number in seen.items():
            # float64: the mean of two half batches and of the whole round differently
            assert number > 0 if name.endswith("flips") else number < 1e-12, seen
