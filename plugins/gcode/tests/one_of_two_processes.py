"""One of two gloo processes: train half of every batch with the branches, print how far from one process it ends.

Usage: python one_of_two_processes.py RANK RENDEZVOUS_FILE
"""

import os
import sys

import regrad
import torch
from regrad_gcode import GCODE
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {"branch": {}, "keep": {"norm": "keep"}, "scale": {"flow": "scale"}}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = [
            nn.Sequential(
                nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(2, outside), nn.Tanh()
            )
            for inside, outside, stride in ((2, 4, 1), (4, 4, 1), (4, 8, 2))
        ]
        return nn.Sequential(
            *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        yield (
            torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )


def train(model, part, options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    correction = GCODE(weight=0.5, warmup_steps=2, fit_every=2, **options)
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for inputs, target in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
        return [*model.parameters()], attachment.state_dict()["corrections"]["gcode"]


def flat(state):
    adam = [
        t for kept in state.values() for s in kept["adam"]["state"].values() for t in s.values()
    ]
    return torch.cat(
        [
            t.flatten()
            for t in (*(t for kept in state.values() for t in kept["branch"].values()), *adam)
        ]
    )


def differs_between_ranks(state):
    theirs = [torch.empty_like(flat(state)) for _ in range(2)]
    distributed.all_gather(theirs, flat(state))
    return not torch.equal(*theirs)


def main(rank, rendezvous):
    whole = {name: train(make_model(), slice(None), options) for name, options in OPTIONS.items()}
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    part = slice(4 * rank, 4 * rank + 4)
    for name, options in OPTIONS.items():
        seen, state = train(DistributedDataParallel(make_model()), part, options)
        weights = zip(seen, whole[name][0], strict=True)
        difference = max((a.detach() - b.detach()).abs().max().item() for a, b in weights)
        sys.stdout.write(f"ddp-{name} {difference}\n")
        sys.stdout.write(
            f"branches-{name} {(flat(state) - flat(whole[name][1])).abs().max().item()}\n"
        )
        sys.stdout.write(f"state-of-ranks-{name} {float(differs_between_ranks(state))}\n")
    model = DistributedDataParallel(make_model())
    draw = (
        nn.GroupNorm.reset_parameters
    )  # as if libraries began differently on two machines: rank 0's weights count
    nn.GroupNorm.reset_parameters = lambda module: [
        nn.init.constant_(p, rank + 1.0) for p in module.parameters()
    ]
    _, state = train(model, part, {})
    nn.GroupNorm.reset_parameters = draw
    sys.stdout.write(f"rank-0-counts {float(differs_between_ranks(state))}\n")
    sharded = make_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    try:
        regrad.attach(sharded, torch.optim.SGD(sharded.parameters(), lr=0.1), [GCODE()])
    except regrad.RegradError as refusal:
        sys.stdout.write(f"fsdp2-refused {float('not exact on layout' not in str(refusal))}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
