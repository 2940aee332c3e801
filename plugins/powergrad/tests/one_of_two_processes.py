"""Started twice by test_layouts.py: print how far weights and gradients are from one process's.

Under DDP and FSDP2 each process trains on half of every batch; of logits in parts it
holds half of the classes.

Arguments: rank, file for the rendezvous.
"""

import os
import sys
from datetime import timedelta

import regrad
import torch
from regrad_powergrad import PowerGradCrossEntropyLoss
from regrad_powergrad.functional import power_grad_cross_entropy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel


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


def classes_in_parts(mesh):
    """Return how far value and gradient of logits in parts are from those of the whole, for several arguments."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (5,), generator=generator)
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    arguments = ({}, {"weight": weight}, {"reduction": "sum"}, {"ignore_index": int(target[0])})
    far = []
    for options in arguments:
        whole = logits.clone().requires_grad_()
        value = power_grad_cross_entropy(whole, target, alpha=0.3, **options)
        value.backward()
        parts = distribute_tensor(logits.clone(), mesh, [Shard(1)]).requires_grad_()
        with loss_parallel():
            seen = power_grad_cross_entropy(parts, target, alpha=0.3, **options)
            seen.backward()
        far += [seen.full_tensor() - value, parts.grad.full_tensor() - whole.grad]
    return max(difference.detach().abs().max().item() for difference in far)


def wrongly_accepted(mesh):
    """Return how many arguments that are wrong for logits in parts raised no TypeError naming the logits."""
    logits, target = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    parts = distribute_tensor(logits, mesh, [Shard(1)])
    soft = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    wrong = (
        lambda: power_grad_cross_entropy(parts, soft),
        lambda: power_grad_cross_entropy(parts, target, label_smoothing=0.1),
        lambda: power_grad_cross_entropy(parts, target),  # outside of loss_parallel
        lambda: power_grad_cross_entropy(parts, distribute_tensor(soft, mesh, [Shard(1)])),
    )
    accepted = 0
    for call in wrong:
        try:
            call()
        except TypeError as error:
            accepted += "logits must" not in str(error)
        else:
            accepted += 1
    return accepted


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
    sys.stdout.write(f"parts {classes_in_parts(mesh)}\nrefusals {wrongly_accepted(mesh)}\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
