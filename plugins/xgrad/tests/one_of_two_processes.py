"""One of two gloo processes: train half of every batch with weight prediction, print how far from one process it ends.

Usage: python one_of_two_processes.py RANK RENDEZVOUS_FILE
"""

import os
import sys

import regrad
import torch
from regrad_xgrad import AdaM3
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class OtherLibrary(torch.optim.Adam):
    """Adam's numbers under another class: the displacement form."""


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam3": lambda p: AdaM3(p, lr=1e-3, weight_decay=0.1),
    "adam3-foreach": lambda p: AdaM3(p, lr=1e-3, foreach=True),
    "displacement": lambda p: OtherLibrary(p, lr=0.01),
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
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def main(rank, rendezvous):
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    part = slice(4 * rank, 4 * rank + 4)
    for name, make_optimizer in OPTIMIZERS.items():
        whole = train(make_model(), make_optimizer, slice(None))
        sharded = make_model()
        for layer in (sharded[0], sharded[3], sharded):
            fully_shard(layer, mesh=mesh)
        for layout, model in (("ddp", DistributedDataParallel(make_model())), ("fsdp2", sharded)):
            seen = train(model, make_optimizer, part)
            difference = max(
                (a.detach() - b.detach()).abs().max().item()
                for a, b in zip(seen, whole, strict=True)
            )
            sys.stdout.write(f"{layout}-{name} {difference}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
