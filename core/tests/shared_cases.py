"""What the cases of `cases_ddp.py`, `cases_fsdp2.py` and `cases_shards.py` share."""

import contextlib

import pytest
import regrad
import torch
import toys
from torch import nn
from torch.distributed.tensor import DTensor

WORLD, STEPS, BATCH = 2, 5, 32


def every_stage():
    return [
        toys.Push(amount=0.02),
        toys.Louder(),
        toys.Scale(),
        toys.UnitRows(),
        toys.Boost(amount=0.01),
        toys.Stretch(),
    ]


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model):
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    return {name.removeprefix("module."): weight for name, weight in weights.items()}


def train(model, optimizer, attachment, rank=0, parts=1, *, micro_batches=1, no_sync=None):
    """Train on this rank's part of every global batch; return the weights."""
    for seed in range(STEPS):
        inputs, labels = (t.chunk(parts)[rank] for t in toys.batch(BATCH, seed=seed))
        optimizer.zero_grad()
        pairs = list(zip(inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        for index, (part, target) in enumerate(pairs):
            last = index == len(pairs) - 1
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                (attachment.criterion(model(part), target) / micro_batches).backward()
        optimizer.step()
    return full_weights(model)


def alone(corrections):
    """Return the weights after the same training in one process."""
    model = toys.Net()
    optimizer = toys.sgd(model)
    return train(
        model, optimizer, regrad.attach(model, optimizer, corrections, nn.CrossEntropyLoss())
    )


def close(one, other, tolerance=1e-12):
    for name, value in other.items():
        torch.testing.assert_close(
            one[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def raises(kind, words, action):
    with pytest.raises(kind) as caught:
        action()
    for word in words:
        assert word in str(caught.value)
