"""One of two gloo processes: train half of every batch with the offset, print how far from one process it ends.

Usage: python one_of_two_processes.py RANK RENDEZVOUS_FILE
"""

import os
import sys

import regrad
import torch
from regrad_gcw import GCW
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
OPTIONS = {"slot": {}, "attention": {"predictor": "attention", "fit_target": "hindsight"}}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 10), torch.nn.GroupNorm(2, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)]
        return torch.nn.Sequential(*layers).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(16):
        yield torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


def train(model, make_optimizer, part, options):
    optimizer = make_optimizer(model.parameters())
    correction = GCW(layers="all", warmup_steps=2, fit_every=4, **options)
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for inputs, target in batches():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
        return [*model.parameters()], attachment.state_dict()["corrections"]["gcw"]


def differs_between_ranks(state):
    flat = torch.cat([t.flatten() for _, kept in sorted(state.items()) for t in kept.values() if torch.is_tensor(t)])
    theirs = [torch.empty_like(flat) for _ in range(2)]
    distributed.all_gather(theirs, flat)
    return not torch.equal(*(t.nan_to_num(-1.0) for t in theirs))


def main(rank, rendezvous):
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    for name, make_optimizer in OPTIMIZERS.items():
        for kind, options in OPTIONS.items():
            whole, _ = train(make_model(), make_optimizer, slice(None), options)
            seen, state = train(DistributedDataParallel(make_model()), make_optimizer, part, options)
            difference = max((a.detach() - b.detach()).abs().max().item() for a, b in zip(seen, whole, strict=True))
            sys.stdout.write(f"ddp-{name}-{kind} {difference}\n")
            sys.stdout.write(f"state-of-ranks-{name}-{kind} {float(differs_between_ranks(state))}\n")
    sharded = make_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    try:
        regrad.attach(sharded, OPTIMIZERS["sgd"](sharded.parameters()), [GCW(layers="all")])
    except regrad.RegradError as refusal:
        sys.stdout.write(f"fsdp2-refused {float('not exact on layout' not in str(refusal))}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
