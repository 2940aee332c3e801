"""What ranks must hold alike: every function here runs on two processes, see `test_processes.py`."""

import itertools
from datetime import timedelta

import pytest
import regrad
import torch
import toys
from regrad import RegradError, ranks
from regrad.correction import Needs
from shared_cases import WORLD, close, raises
from torch import distributed, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel


class Whole(toys.Scale):
    """Says that it reads the whole model, and what to do where that is in parts."""

    name = "whole"
    needs = Needs(
        stages=("gradient",),
        layouts=toys.EVERYWHERE,
        reads=("model",),
        conflicts={"parts": "use scale instead"},
    )


class OfMicroBatches(toys.Scale):
    """Reads the micro-batches of a step, which the processes must take together."""

    name = "micro"
    needs = Needs(stages=("gradient",), reads=("micro",))


class Recorded(toys.Scale):
    """Reads the record of the first forward, which is one of the whole model."""

    name = "recorded"
    needs = Needs(stages=("gradient",), layouts=toys.EVERYWHERE, record=True)


def linear(*sizes, seed=0):
    """Return linear layers behind each other, with weights of the seed."""
    layers = [nn.Linear(a, b).double() for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers)
    toys.fill(model, seed)
    return model


def attach(model, *corrections):
    """Attach to a model with an optimizer of its own; return both."""
    optimizer = toys.sgd(model)
    return optimizer, regrad.attach(model, optimizer, list(corrections))


def step(model, optimizer):
    """Take one step with gradients of 1."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def case_parameters_of_other_shapes_are_refused_on_every_rank_where_the_whole_model_is_read(rank):
    model = linear(3, 5 + rank)
    for correction in (Whole(), Recorded()):
        raises(
            RegradError,
            [repr(correction.name), "whole model", "0.weight [5, 3]", "0.weight [6, 3]"],
            lambda c=correction: attach(model, c),
        )
    raises(RegradError, ["use scale instead"], lambda: attach(model, Whole(), Recorded()))
    attach(model, toys.Scale())


def case_parameters_of_other_names_are_refused_where_the_whole_model_is_read(rank):
    model = nn.ModuleDict({f"expert{rank}": nn.Linear(3, 3)})
    raises(RegradError, ["expert0.weight", "expert1.weight"], lambda: attach(model, Whole()))
    attach(model, toys.Scale())
    model = nn.ModuleDict({"shared": linear(3, 3, 3, 3), f"expert{rank}": nn.Linear(3, 3)})
    words = ["expert0.weight [3, 3], expert0.bias [3] on 0, expert1.weight [3, 3]"]
    raises(RegradError, words, lambda: attach(model, Whole()))


def case_optimizers_that_hold_other_parts_of_one_model_are_refused(rank):
    model = linear(3, 3, 3)
    optimizer = toys.sgd(model[rank])
    words = ["whole model", "0.bias [3], 1.weight [3, 3] outside the optimizer, … (4 in all) on 0"]
    raises(RegradError, words, lambda: regrad.attach(model, optimizer, [Whole()]))
    regrad.attach(model, optimizer, [toys.Scale()])


def case_stages_of_one_shape_and_name_are_refused_at_the_first_step_with_nothing_changed(rank):
    model = linear(3, 3, seed=rank)
    optimizer, attachment = attach(model, Whole())
    before = toys.weights_of(model)
    for _ in range(2):  # tried again, it is refused again
        raises(RegradError, ["'whole'", "broadcast", "use scale"], lambda: step(model, optimizer))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert attachment.metrics()["steps_applied"] == 0


def case_weights_that_ddp_makes_the_same_after_attach_are_accepted(rank):
    model = toys.Net(seed=rank)
    optimizer, attachment = attach(model, Whole())
    parallel = DistributedDataParallel(model)
    toys.train_step(parallel, optimizer)
    toys.train_step(parallel, optimizer)
    assert attachment.metrics()["steps_applied"] == 2


def case_copies_need_no_second_look(rank):
    model = toys.Net()
    assert ranks.agree_across_ranks(model, toys.sgd(model), [Whole()])
    other = toys.Net(seed=rank)
    assert not ranks.agree_across_ranks(other, toys.sgd(other), [Whole()])
    assert ranks.agree_across_ranks(other, toys.sgd(other), [toys.Scale()])  # nobody asks


def case_stages_of_torchs_pipelines_are_refused_whatever_their_weights(rank):
    model = linear(3, 3)
    early, late = linear(3, 3), linear(3, 3)
    late_optimizer, _ = attach(late, Whole())
    stages = [PipelineStage(m, rank, WORLD, torch.device("cpu")) for m in (model, early, late)]
    raises(RegradError, [f"stage 0 of {WORLD}", "'whole'"], lambda: attach(model, Whole()))
    parallel = DistributedDataParallel(early)
    raises(RegradError, ["pipelining"], lambda: attach(parallel, Recorded()))
    raises(RegradError, ["pipelining"], lambda: step(late, late_optimizer))
    attach(model, toys.Scale())
    del stages


def case_a_pipeline_trains_with_what_reads_single_elements(rank):
    whole = linear(3, 4, 2, seed=3)
    part = linear(3, 4, 2, seed=3)[rank : rank + 1]
    stage = PipelineStage(part, rank, WORLD, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    for model, run in ((whole, None), (part, schedule)):
        optimizer, _ = attach(model, toys.Scale())
        for seed in range(3):
            inputs, target = toys.batch(8, seed=seed)[0], toys.batch(8, seed=seed + 9)[0][:, :2]
            optimizer.zero_grad()
            if run is None:
                nn.functional.mse_loss(model(inputs), target).backward()
            elif rank == 0:
                run.step(inputs)
            else:
                run.step(target=target)
            optimizer.step()
    for seen, wanted in zip(part.parameters(), whole[rank].parameters(), strict=True):
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-12)


def case_weights_that_several_processes_of_the_model_group_hold_are_refused_on_every_rank(rank):
    world = distributed.group.WORLD
    parts = nn.ModuleDict({"shared": linear(3, 3), f"expert{rank}": linear(3, 3, seed=rank)})
    copies = linear(3, 3)
    for model, name in ((parts, "shared.0.weight"), (DistributedDataParallel(copies), "0.weight")):
        words = ["'whole' must see each weight once", f"{name} [3, 3] is the same on 0 and 1"]
        raises(RegradError, words, lambda m=model: attach_over(m, world, Whole()))
        attach_over(model, world, toys.Scale())
    apart = linear(3, 3, seed=rank)
    with torch.no_grad():
        apart[0].bias.zero_()  # on both, and yet not the same
    attach_over(apart, world, Whole())
    alone = distributed.new_subgroups(1)[0]
    attach_over(copies, alone, Whole())


def attach_over(model, group, correction):
    """Attach, with sums over the processes of a group."""
    return regrad.attach(model, toys.sgd(model), [correction], model_group=group)


def case_ranks_that_differ_in_the_length_of_what_they_attach_all_stop(rank):
    model = toys.Net()
    many = [toys.Scale(), toys.Add(), toys.Boost()]
    raises(RegradError, ["must attach the same"], lambda: attach(model, *many[: 1 + 2 * rank]))


def case_an_empty_first_group_is_no_obstacle(rank):
    model = toys.Net()
    optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    toys.train_step(model, optimizer)
    assert attachment.metrics()["steps_applied"] == 1


def case_a_rank_that_does_not_attach_is_named_when_the_others_gave_up(rank):
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=2))
    world = distributed.group.WORLD
    distributed.distributed_c10d._update_default_pg(group)
    try:
        if rank == 0:
            raises(RegradError, ["every rank"], lambda: attach(toys.Net(), toys.Scale()))
    finally:
        distributed.distributed_c10d._update_default_pg(world)


def case_parameters_that_the_process_group_cannot_reach_are_refused(rank):
    distributed.new_group([0, 1])
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reached = distributed.get_backend_config
    distributed.get_backend_config = lambda: "cuda:nccl"
    try:
        model = nn.ParameterList([parameter])
        raises(
            RegradError,
            ["got cpu", "cuda:nccl", "move the model"],
            lambda: regrad.attach(model, optimizer, [toys.Scale()]),
        )
    finally:
        distributed.get_backend_config = reached


def case_the_optimizer_inside_torchs_local_sgd_is_attached_to(rank):
    trained = []
    for given in (False, True):
        model = toys.Net()
        inner = toys.sgd(model)
        averager = PeriodicModelAverager(period=2, warmup_steps=0)
        wrapper = PostLocalSGDOptimizer(inner, averager)
        corrections = [toys.Push(amount=0.02), toys.Scale()]
        attachment = regrad.attach(model, wrapper if given else inner, corrections)
        assert attachment.optimizer is inner
        for seed in range(4):
            toys.train_step(model, wrapper, seed=2 * seed + rank)
        assert attachment.metrics()["steps_applied"] == 4
        trained.append(toys.weights_of(model))
    close(*trained, 0)


def average_of(model, **options):
    """Return torch's local SGD around an optimizer of the model."""
    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    return PostLocalSGDOptimizer(toys.sgd(model, **options), averager)


def case_what_reads_micro_batches_is_refused_under_torchs_local_sgd(rank):
    for wrap in (lambda model: model, DistributedDataParallel):
        model = wrap(toys.Net())
        raises(
            RegradError,
            ["'micro'", "PostLocalSGDOptimizer", "use DDP alone"],
            lambda m=model: regrad.attach(m, average_of(m), [OfMicroBatches()]),
        )
        regrad.attach(model, average_of(model), [toys.Scale()])


def case_what_reads_micro_batches_is_refused_where_processes_stop_at_different_steps(rank):
    model = DistributedDataParallel(toys.Net())
    optimizer, _ = attach(model, OfMicroBatches())
    before = toys.weights_of(model)
    for _ in range(2):  # whatever was refused before
        with pytest.raises(RegradError, match="the same number of batches"), Join([model]):
            toys.train_step(model, optimizer)
    close(toys.weights_of(model), before, 0)
    model = DistributedDataParallel(toys.Net())
    optimizer, attachment = attach(model, toys.Scale())
    with Join([model]):
        for seed in range(3 - rank):
            toys.train_step(model, optimizer, seed=seed)
    assert attachment.metrics()["steps_applied"] == 3 - rank


def case_what_reads_micro_batches_is_refused_where_ddp_leaves_gradients_apart_at_a_step(rank):
    model = DistributedDataParallel(toys.Net())
    optimizer, attachment = attach(model, OfMicroBatches())
    with model.no_sync():
        toys.loss_of(model).backward()
        raises(RegradError, ["'micro'", "local SGD", "outside of no_sync()"], optimizer.step)
    toys.loss_of(model).backward()
    optimizer.step()
    assert attachment.metrics()["steps_applied"] == 1
    other = DistributedDataParallel(toys.Net())
    optimizer, attachment = attach(other, toys.Scale())
    with other.no_sync():
        toys.train_step(other, optimizer)
    assert attachment.metrics()["steps_applied"] == 1
