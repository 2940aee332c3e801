"""Started twice by test_layouts.py: train on half of every batch, print how far the weights are from one process's.

Arguments: rank, file for the rendezvous.
"""

import os
import sys
from datetime import timedelta

import regrad
import torch
from regrad_powergrad import PowerGradCrossEntropyLoss
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def make():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
            )
    return model


def train(model, optimizer, criterion, rows):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)[rows]
        target = torch.randint(5, (16,), generator=generator)[rows]
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def main(rank, rendezvous):
    torch.set_num_threads(1)
    patience = timedelta(seconds=90)
    distributed.init_process_group(
        "gloo", f"file://{rendezvous}", timeout=patience, rank=rank, world_size=2
    )
    alone = make()
    train(alone, sgd(alone), PowerGradCrossEntropyLoss(alpha=0.3), slice(None))

    sharded = make()
    mesh = init_device_mesh("cpu", (2,))
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mesh=mesh)
    for layout, model in (("ddp", nn.parallel.DistributedDataParallel(make())), ("fsdp2", sharded)):
        optimizer = sgd(model)
        attachment = regrad.attach(model, optimizer, ["powergrad:alpha=0.3"], nn.CrossEntropyLoss())
        train(model, optimizer, attachment.criterion, slice(rank * 8, rank * 8 + 8))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        full = ((p.full_tensor() if layout == "fsdp2" else p, q) for p, q in pairs)
        sys.stdout.write(f"{layout} {max((p - q).abs().max().item() for p, q in full)}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
