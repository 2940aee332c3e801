"""The window and others' writes under DDP and FSDP2, on two processes, see `test_processes.py`."""

import warnings

import regrad
import torch
import toys
from regrad import RegradWarning
from shared_cases import BATCH, WORLD, close, full_weights
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def plain():
    return toys.Net()


def replicated():
    return DistributedDataParallel(toys.Net())


def sharded():
    model = toys.Net()
    for part in (model.body, model.head):
        fully_shard(part)
    fully_shard(model)
    return model


def train_step(model, optimizer, seed, rank=0, parts=1):
    inputs, labels = (tensor.chunk(parts)[rank] for tensor in toys.batch(BATCH, seed=seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def written(model, through_data):
    """Write half of the value into the head's weight, on every process its part."""
    head = next(p for name, p in model.named_parameters() if name.endswith("head.weight"))
    if through_data:
        getattr(head, "_local_tensor", head).data.mul_(0.5)
    else:
        with torch.no_grad():
            head.mul_(0.5)


def with_two_optimizers(make, rank=0, parts=1):
    model = make()
    own, other = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    regrad.attach(model, own, [toys.Shift(amount=0.1)])
    for seed, optimizer in enumerate([own, other, own, other, own]):
        train_step(model, optimizer, seed, rank, parts)
    return full_weights(model)


def with_a_write(make, rank=0, parts=1, *, through_data=False):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regrad.attach(model, optimizer, [toys.Shift(amount=0.1)])
    train_step(model, optimizer, 0, rank, parts)
    inputs, labels = (tensor.chunk(parts)[rank] for tensor in toys.batch(BATCH, seed=1))
    nn.functional.cross_entropy(model(inputs), labels).backward()
    written(model, through_data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    assert [w.category for w in told] == [RegradWarning]
    return full_weights(model)


def case_another_optimizer_steps_from_the_true_weights_under_ddp_and_fsdp2(rank):
    expected = with_two_optimizers(plain)
    for make in (replicated, sharded):
        close(with_two_optimizers(make, rank, WORLD), expected)


def case_writes_inside_the_window_stay_under_ddp_and_fsdp2(rank):
    for through_data in (False, True):
        expected = with_a_write(plain, through_data=through_data)
        for make in (replicated, sharded):
            close(with_a_write(make, rank, WORLD, through_data=through_data), expected)
