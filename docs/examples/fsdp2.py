"""FSDP2: attach after fully_shard; each process holds half of every weight.

    torchrun --nproc-per-node 2 docs/examples/fsdp2.py

Needs regrad-xgrad and regrad-clipping. Runs on CPUs with gloo; with GPUs, use nccl and
the device "cuda".
"""

import copy
import os
import sys

import regrad
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CORRECTIONS = ["xgrad", "agc:max_ratio=0.02"]


def train(model: nn.Module, part: slice) -> tuple[list[torch.Tensor], regrad.Attachment]:
    """Train on one part of every batch; return the whole weights and what was attached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = regrad.attach(model, optimizer, CORRECTIONS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        inputs = torch.randn(32, 20, generator=generator)
        targets = inputs[:, :5].argmax(dim=1)
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return [
        p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()
    ], attachment


def main() -> None:
    """Train sharded on two processes, and the same on this one alone."""
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    sharded = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)

    each = 32 // world
    weights, attachment = train(sharded, slice(rank * each, (rank + 1) * each))
    expected, _ = train(alone, slice(None))
    difference = max(
        (one - other).abs().max().item() for one, other in zip(weights, expected, strict=True)
    )
    if rank == 0:
        numbers = attachment.metrics()
        print(attachment)
        print(f"steps: {numbers['steps_applied']:.0f}, on {world} processes")
        moved = numbers["xgrad/weights/relative_change"]
        print(f"xgrad moved this process's part by {moved:.1e} of its norm")
        print(f"sharded against one process: largest difference {difference:.0e}")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    # gloo's threads may outlive the group and abort the interpreter's own exit.
    os._exit(0 if difference < 1e-5 else 1)


if __name__ == "__main__":
    main()
