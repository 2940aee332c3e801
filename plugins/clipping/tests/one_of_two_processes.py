"""One of two gloo processes: train half of every batch with clipping, print how far from one process it ends.

Usage: python one_of_two_processes.py RANK RENDEZVOUS_FILE
"""

import os
import sys

import regrad
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

SPECS = ["clip-norm:max_norm=0.05", "clip-value:max_value=0.003", "agc:max_ratio=0.01"]


class Net(nn.Module):
    """Layers of every kind of unit, with sizes that two processes cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.spread = nn.ConvTranspose1d(3, 6, 2, groups=3)
        self.gain = nn.Parameter(torch.ones(6, 1))
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.spread((x + self.attention(x, x, x, need_weights=False)[0]).transpose(1, 2))
        return self.head(torch.tanh(self.norm(x * self.gain)).mean(2))


def make_model():
    generator = torch.Generator().manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
            )
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        yield (
            torch.randint(7, (8, 4), generator=generator),
            torch.randint(5, (8,), generator=generator),
        )


def train(model, spec, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with regrad.attach(model, optimizer, [spec]) as attachment:
        for inputs, target in batches():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
        if attachment.metrics()[f"{attachment.corrections[0].name}/gradient/trigger_rate"] < 1:
            raise SystemExit(f"{spec} clipped nothing")
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def main(rank, rendezvous):
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    part = slice(4 * rank, 4 * rank + 4)
    for spec in SPECS:
        whole = train(make_model(), spec, slice(None))
        by_row, by_last = make_model(), make_model()
        for layer in (by_row.attention, by_row.spread, by_row):
            fully_shard(layer, mesh=mesh)
        # units split between the processes, where the sizes allow it
        even = lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % 2 == 0 else None  # noqa: E731
        fully_shard(by_last, mesh=mesh, shard_placement_fn=even)
        models = {"ddp": DistributedDataParallel(make_model()), "rows": by_row, "columns": by_last}
        for layout, model in models.items():
            seen = train(model, spec, part)
            difference = max(
                (a.detach() - b.detach()).abs().max().item()
                for a, b in zip(seen, whole, strict=True)
            )
            sys.stdout.write(f"{layout}-{spec.partition(':')[0]} {difference}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
