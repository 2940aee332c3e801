"""DDP, and what is refused: every function here runs on two processes, see `test_processes.py`."""

import regrad
import torch
import toys
from regrad import RegradError
from regrad.correction import Needs
from shared_cases import STEPS, WORLD, alone, close, every_stage, raises, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def case_ddp_on_two_processes_is_one_process_with_attach_before_and_after(rank):
    expected = alone(every_stage())
    for attach_first in (False, True):
        model = toys.Net()
        optimizer, corrections = toys.sgd(model), every_stage()
        attach = lambda m, o=optimizer, c=corrections: regrad.attach(m, o, c, nn.CrossEntropyLoss())  # noqa: E731
        attachment = attach(model) if attach_first else None
        parallel = DistributedDataParallel(model)
        attachment = attachment or attach(parallel)
        close(train(parallel, optimizer, attachment, rank, WORLD), expected)
        assert corrections[0].calls == STEPS


def case_accumulation_under_ddp_is_one_process(rank):
    model = toys.Net()
    optimizer, parallel = toys.sgd(model), DistributedDataParallel(model)
    shift = toys.Push(amount=0.02)
    attachment = regrad.attach(parallel, optimizer, [shift, toys.Scale()], nn.CrossEntropyLoss())
    weights = train(
        parallel, optimizer, attachment, rank, WORLD, micro_batches=4, no_sync=parallel.no_sync
    )
    assert shift.calls == STEPS
    close(weights, alone([toys.Push(amount=0.02), toys.Scale()]))


def case_a_state_dict_inside_the_window_is_true_under_ddp(rank):
    model = toys.Net()
    parallel, true = DistributedDataParallel(model), toys.weights_of(model)
    regrad.attach(parallel, toys.sgd(model), [toys.Shift()])
    toys.loss_of(parallel)
    assert not torch.equal(model.head.bias, true["head.bias"])
    close(dict(parallel.state_dict()), {f"module.{name}": value for name, value in true.items()}, 0)
    parallel.eval()
    toys.loss_of(parallel)
    close(toys.weights_of(model), true, 0)


def case_evaluating_the_inner_module_closes_the_window_under_ddp(rank):
    model = toys.Net()
    parallel, true = DistributedDataParallel(model), toys.weights_of(model)
    regrad.attach(parallel, toys.sgd(model), [toys.Shift()])
    toys.loss_of(parallel).backward()
    parallel.module.eval()
    toys.loss_of(parallel.module)
    close(toys.weights_of(model), true, 0)


def case_ddp_under_compile_is_one_process(rank):
    model = toys.Net()
    optimizer, corrections = toys.sgd(model), every_stage()
    compiled = torch.compile(DistributedDataParallel(model), backend="eager")
    attachment = regrad.attach(compiled, optimizer, corrections, nn.CrossEntropyLoss())
    weights = train(compiled, optimizer, attachment, rank, WORLD)
    assert corrections[0].calls == STEPS
    close(
        {name.removeprefix("_orig_mod.module."): weight for name, weight in weights.items()},
        alone(every_stage()),
    )


def case_ranks_that_attach_different_options_all_stop_with_the_difference(rank):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attach = lambda *corrections: regrad.attach(model, optimizer, list(corrections))  # noqa: E731
    raises(
        RegradError,
        ["factor=0.5", "factor=0.25"],
        lambda: attach(toys.Scale(factor=0.5 if rank else 0.25)),
    )
    pair = [toys.Scale(), toys.Add()]
    raises(RegradError, ["rank"], lambda: attach(*(pair if rank else pair[::-1])))
    raises(
        RegradError,
        ["Add"],
        lambda: attach(*([toys.Scale(), toys.Add()] if rank else [toys.Scale()])),
    )
    attach(toys.Scale())


def case_a_layout_that_a_correction_is_not_exact_on_is_refused(rank):
    class Plain(toys.Scale):
        needs = Needs(stages=("gradient",))

    model = toys.Net()
    parallel = DistributedDataParallel(model)
    raises(
        RegradError, ["scale", "'ddp'"], lambda: regrad.attach(parallel, toys.sgd(model), [Plain()])
    )
    model = fully_shard(toys.Net())
    raises(
        RegradError, ["scale", "'fsdp2'"], lambda: regrad.attach(model, toys.sgd(model), [Plain()])
    )


def case_a_zero_redundancy_optimizer_is_refused_where_layouts_are_listed_without_it(rank):
    model = toys.Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    raises(
        RegradError,
        ["scale", "'zero-redundancy'"],
        lambda: regrad.attach(model, optimizer, [toys.Scale()]),
    )


def case_fsdp1_is_refused_where_layouts_are_listed_without_it(rank):
    model = FullyShardedDataParallel(toys.Net(), device_id=torch.device("cpu"))
    raises(
        RegradError,
        ["scale", "'flat'"],
        lambda: regrad.attach(model, toys.sgd(model), [toys.Scale()]),
    )
