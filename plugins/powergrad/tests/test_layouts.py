"""Two gloo processes train as one, under DDP and FSDP2, and with logits whose classes are in parts.

Under DDP and FSDP2 each process trains on half of every batch; of logits in parts it
holds half of the classes.
"""

import pytest
import regrad
import torch
from regrad.sharding import is_sharded
from regrad_powergrad import PowerGradCrossEntropyLoss
from regrad_powergrad.functional import power_grad_cross_entropy
from regrad_testing.processes import launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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


def in_parts(tensor):
    """Cut a tensor along its second dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, init_device_mesh("cpu", (2,)), [Shard(1)])


def sharded():
    """Return the model with its weights cut by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def whole(parameter):
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def layouts(rank):
    """Return how far both layouts end from one process."""
    alone = make()
    train(alone, sgd(alone), PowerGradCrossEntropyLoss(alpha=0.3), slice(None))
    seen = {}
    for layout, model in (("ddp", DistributedDataParallel(make())), ("fsdp2", sharded())):
        optimizer = sgd(model)
        attachment = regrad.attach(model, optimizer, ["powergrad:alpha=0.3"], nn.CrossEntropyLoss())
        train(model, optimizer, attachment.criterion, slice(rank * 8, rank * 8 + 8))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        seen[layout] = max((whole(p) - q).abs().max().item() for p, q in pairs)
    return seen


def classes_in_parts(rank):
    """Return how far value and gradient of logits in parts are from those of the whole, for several arguments."""
    from torch.distributed.tensor.parallel import loss_parallel

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (5,), generator=generator)
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    arguments = ({}, {"weight": weight}, {"reduction": "sum"}, {"ignore_index": int(target[0])})
    far = []
    for options in arguments:
        together = logits.clone().requires_grad_()
        value = power_grad_cross_entropy(together, target, alpha=0.3, **options)
        value.backward()
        parts = in_parts(logits.clone()).requires_grad_()
        with loss_parallel():
            seen = power_grad_cross_entropy(parts, target, alpha=0.3, **options)
            seen.backward()
        far += [seen.full_tensor() - value, parts.grad.full_tensor() - together.grad]
    return max(difference.detach().abs().max().item() for difference in far)


def wrong_arguments(rank):
    """Raise unless arguments that are wrong for logits in parts raise a TypeError that names the logits."""
    logits = torch.zeros(4, 6, dtype=torch.float64)
    target = torch.zeros(4, dtype=torch.int64)
    soft = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    parts = in_parts(logits)
    with pytest.raises(TypeError, match="logits must"):
        power_grad_cross_entropy(parts, soft)
    with pytest.raises(TypeError, match="logits must"):
        power_grad_cross_entropy(parts, target, label_smoothing=0.1)
    with pytest.raises(TypeError, match="logits must"):
        power_grad_cross_entropy(parts, target)  # outside of loss_parallel
    with pytest.raises(TypeError, match="logits must"):
        power_grad_cross_entropy(parts, in_parts(soft))


class OnTwoProcesses:
    """What both processes run, in one start."""

    @classmethod
    def cases(cls):
        return {"layouts": layouts, "parts": classes_in_parts, "refusals": wrong_arguments}


def test_two_processes_train_as_one_and_logits_in_parts_are_exact_or_refused():
    for seen in launch(OnTwoProcesses):
        assert seen["layouts"].keys() == {"ddp", "fsdp2"}
        # float64: the mean of two half batches and of the whole round differently
        assert all(difference < 1e-14 for difference in seen["layouts"].values()), seen
        assert seen["parts"] < 1e-14
        assert seen["refusals"] is None, seen["refusals"]["error"]
