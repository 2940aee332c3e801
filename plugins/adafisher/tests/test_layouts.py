"""Two gloo processes train as one under DDP and `replicate`; FSDP2 is refused in words."""

from functools import partial

import pytest
import regrad
import torch
from regrad_adafisher import AdaFisher
from regrad_testing.processes import launch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {
    "published": {},
    "ema": {"average": "ema", "damping": 0.1},
    "mean": {"fisher": "mean"},
}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        inputs = torch.randn(8, 3, 4, generator=generator, dtype=torch.float64)
        yield inputs, torch.randint(3, (8,), generator=generator)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def zero(parameters):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.05, momentum=0.9)


def train(model, part, options, length=3, parts=1, make_optimizer=sgd, late=()):
    """Train, and return weights and averages; what is called `late` is frozen for three steps."""
    optimizer = make_optimizer(model.parameters())
    frozen = [p for name, p in model.named_parameters() if name.removeprefix("module.") in late]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=2, **options)]) as attachment:
        for index, (inputs, target) in enumerate(batches()):
            for parameter in frozen:
                parameter.requires_grad_(index >= 3)
            optimizer.zero_grad()
            pairs = zip(inputs[part, :length].chunk(parts), target[part].chunk(parts), strict=True)
            for rows, wanted in pairs:
                logits = model(rows).mean(dim=1)
                (nn.functional.cross_entropy(logits, wanted) / parts).backward()
            optimizer.step()
        state = attachment.state_dict()["corrections"]["adafisher"]
    vectors = [kept[key] for kept in state.values() for key in ("inputs", "outputs")]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.cat([weights, *vectors])


def half(rank):
    return slice(4 * rank, 4 * rank + 4)


def is_the_same_on_both_ranks(found):
    theirs = [torch.empty_like(found) for _ in range(2)]
    distributed.all_gather(theirs, found)
    return torch.equal(*theirs)


def compared(rank, wrap, late=(), **how):
    """Return, for every option, how far two processes end from one, and whether ranks agree."""
    seen = {}
    for name, options in OPTIONS.items():
        found = train(wrap(make_model()), half(rank), options, late=late, **how)
        alone = train(make_model(), slice(None), options, late=late)  # in the same process group
        far = (found - alone).abs().max().item()
        seen[name] = {"far": far, "agree": is_the_same_on_both_ranks(found)}
    return seen


def under_ddp(rank):
    return compared(rank, DistributedDataParallel)


def under_ddp_in_parts(rank):
    return compared(rank, DistributedDataParallel, parts=2)


def unfrozen_later(rank):
    """Return the same for layers that get gradients after three steps, between two refreshes."""
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    return compared(rank, wrap, late=("0.weight", "0.bias", "1.weight", "1.bias"))


def partitioned(rank):
    return compared(rank, DistributedDataParallel, make_optimizer=zero)


def replicated(rank):
    from torch.distributed._composable.replicate import replicate

    return compared(rank, replicate)


def of_other_lengths(rank):
    """Say whether ranks agree where their sequences have different lengths."""
    wrapped = DistributedDataParallel(make_model())
    return is_the_same_on_both_ranks(train(wrapped, half(rank), {}, length=2 + rank))


def averaged_by_hand(rank):
    """Say whether ranks agree where the loop averages the gradients itself."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=1)]):
        for inputs, target in batches():
            optimizer.zero_grad()
            logits = model(inputs[half(rank)]).mean(dim=1)
            nn.functional.cross_entropy(logits, target[half(rank)]).backward()
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(2)
            optimizer.step()
    return is_the_same_on_both_ranks(torch.cat([p.detach().flatten() for p in model.parameters()]))


def refusal(rank):
    """Return what attaching to shards says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = make_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    try:
        regrad.attach(sharded, torch.optim.SGD(sharded.parameters(), lr=0.1), [AdaFisher()])
    except regrad.RegradError as refused:
        return str(refused)
    return "nothing was refused"


class OnTwoProcesses:
    """What both processes run, in one start."""

    @classmethod
    def cases(cls):
        return {
            "ddp": under_ddp,
            "ddp in parts": under_ddp_in_parts,
            "later": unfrozen_later,
            "replicate": replicated,
            "zero": partitioned,
            "other lengths": of_other_lengths,
            "by hand": averaged_by_hand,
            "refused": refusal,
        }


@pytest.mark.long
def test_two_processes_train_as_one_with_equal_state_and_fsdp2_is_refused_in_words():
    for seen in launch(OnTwoProcesses):
        for layout in ("ddp", "ddp in parts", "later", "replicate", "zero"):
            for name, found in seen[layout].items():
                # float64: the mean of two half batches and of the whole round differently
                assert found["far"] < 1e-12, (layout, name)
                assert found["agree"], (layout, name)
        assert seen["other lengths"] is True
        assert seen["by hand"] is True
        assert "not exact on layout 'fsdp2'" in seen["refused"]
        assert "FSDP2 hides the gradients" in seen["refused"]
