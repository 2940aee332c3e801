"""What two processes do in `test_processes.py`, which starts this file once per rank.

Usage: python workers.py RANK FOLDER. Every function whose name starts with `case_` is
run with a process group of its own; what it raised is written to FOLDER/RANK.json.
"""

import contextlib
import itertools
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import regrad
import torch
import toys
from regrad import RegradError
from regrad.correction import Needs
from regrad.sharding import row_norms, total_norm
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

WORLD, STEPS, BATCH = 2, 5, 32
PATIENCE = timedelta(seconds=60)


def every_stage():
    return [toys.Push(amount=0.02), toys.Louder(), toys.Scale(), toys.UnitRows(), toys.Boost(amount=0.01)]


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
    return train(model, optimizer, regrad.attach(model, optimizer, corrections, nn.CrossEntropyLoss()))


def sharded(corrections=None, *, seed=0, nested=True, reshard=True):
    """Return a model under FSDP2, its optimizer and, where there are corrections, the attachment."""
    model = toys.Net(seed=seed)
    for part in (model.body, model.head) if nested else ():
        fully_shard(part, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    optimizer = toys.sgd(model)
    if corrections is None:
        return model, optimizer, None
    return model, optimizer, regrad.attach(model, optimizer, corrections, nn.CrossEntropyLoss())


def close(one, other, tolerance=1e-12):
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def raises(kind, words, action):
    try:
        action()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


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
    weights = train(parallel, optimizer, attachment, rank, WORLD, micro_batches=4, no_sync=parallel.no_sync)
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


def case_ranks_that_attach_different_options_all_stop_with_the_difference(rank):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attach = lambda *corrections: regrad.attach(model, optimizer, list(corrections))  # noqa: E731
    raises(RegradError, ["factor=0.5", "factor=0.25"], lambda: attach(toys.Scale(factor=0.5 if rank else 0.25)))
    pair = [toys.Scale(), toys.Add()]
    raises(RegradError, ["rank"], lambda: attach(*(pair if rank else pair[::-1])))
    raises(RegradError, ["Add"], lambda: attach(*([toys.Scale(), toys.Add()] if rank else [toys.Scale()])))
    attach(toys.Scale())


def case_layouts_that_a_correction_is_not_exact_on_are_refused(rank):
    class Plain(toys.Scale):
        needs = Needs(stages=("gradient",))

    model = toys.Net()
    parallel = DistributedDataParallel(model)
    raises(RegradError, ["scale", "'ddp'"], lambda: regrad.attach(parallel, toys.sgd(model), [Plain()]))
    raises(RegradError, ["scale", "'fsdp2'"], lambda: sharded([Plain()]))


def case_a_zero_redundancy_optimizer_is_refused(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = toys.Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    raises(RegradError, ["scale", "'flat'"], lambda: regrad.attach(model, optimizer, [toys.Scale()]))


def case_fsdp1_is_refused(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(toys.Net(), device_id=torch.device("cpu"))
    raises(RegradError, ["scale", "'flat'"], lambda: regrad.attach(model, toys.sgd(model), [toys.Scale()]))


def case_fsdp2_on_two_processes_is_one_process(rank):
    expected = alone(every_stage())
    for nested, reshard in itertools.product((True, False), repeat=2):
        corrections = every_stage()
        model, optimizer, attachment = sharded(corrections, nested=nested, reshard=reshard)
        close(train(model, optimizer, attachment, rank, WORLD), expected)
        assert corrections[0].calls == STEPS


def case_accumulation_under_fsdp2_is_one_process(rank):
    model, optimizer, attachment = sharded(every_stage())

    @contextlib.contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    weights = train(model, optimizer, attachment, rank, WORLD, micro_batches=4, no_sync=no_sync)
    close(weights, alone(every_stage()))


def case_attached_before_fully_shard_raises_at_the_first_prediction(rank):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Shift()])
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    raises(RegradError, ["attach after fully_shard"], lambda: toys.loss_of(model))


class Wraps(nn.Module):
    """Return the output of the net inside a container."""

    def __init__(self, container):
        super().__init__()
        self.net, self.container = toys.Net(), container

    def forward(self, x):
        return self.container(self.net(x))


def case_an_evaluation_between_forward_and_backward_raises_under_fsdp2(rank):
    containers = [lambda t: t, lambda t: {"logits": t}, lambda t: (t,)]
    for container in containers:
        model = fully_shard(Wraps(container))
        optimizer = toys.sgd(model)
        regrad.attach(model, optimizer, [toys.Shift()])
        output = model(toys.batch()[0])
        model.eval()
        raises(RegradError, ["between forward and backward"], lambda m=model: m(toys.batch()[0]))
        next(iter(output.values() if isinstance(output, dict) else output)).sum().backward()
        model(toys.batch()[0])
        model.train()


def case_an_evaluation_restores_and_the_next_prediction_is_seen_under_fsdp2(rank):
    plain, moved = toys.Net(), toys.Net()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.5)
    for reshard, nested in itertools.product((True, False), repeat=2):
        model, *_ = sharded([toys.Shift(amount=0.5)], reshard=reshard, nested=nested)
        for _ in range(2):
            model.train()
            loss = toys.loss_of(model)
            torch.testing.assert_close(loss, toys.loss_of(moved), rtol=0, atol=1e-14)
            loss.backward()
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(toys.loss_of(model), toys.loss_of(plain), rtol=0, atol=1e-14)
        close(full_weights(model), full_weights(plain), 0)


def case_a_state_dict_inside_the_window_is_true_under_fsdp2(rank):
    model, optimizer, _ = sharded([toys.Shift()])
    true = full_weights(model)
    toys.loss_of(model).backward()
    saved = model.state_dict()
    assert all(isinstance(value, DTensor) for value in saved.values())
    close({name: full(value) for name, value in saved.items()}, true, 0)
    kept = {name: value.to_local().clone() for name, value in saved.items()}
    optimizer.step()
    toys.loss_of(model).backward()
    close({name: value.to_local() for name, value in saved.items()}, kept, 0)


def case_loading_inside_the_window_is_right_under_fsdp2(rank):
    model, optimizer, _ = sharded([toys.Shift()])
    other, *_ = sharded(seed=5)
    toys.loss_of(model).backward()
    model.load_state_dict(other.state_dict())
    close(full_weights(model), full_weights(other), 0)
    model.zero_grad()
    optimizer.step()
    close(full_weights(model), full_weights(other), 0)


def case_detach_inside_the_window_restores_under_fsdp2(rank):
    model, _, attachment = sharded([toys.Shift()])
    true = full_weights(model)
    toys.loss_of(model).backward()
    attachment.detach()
    close(full_weights(model), true, 0)
    torch.testing.assert_close(toys.loss_of(model), toys.loss_of(toys.Net()), rtol=0, atol=1e-14)


def case_meters_measure_under_fsdp2(rank):
    model, optimizer, attachment = sharded([toys.Shift(), toys.Scale(factor=0.5), toys.Boost()])
    for seed in range(2):
        toys.train_step(model, optimizer, seed=seed)
    effects = attachment.receipt()["effects"]
    assert abs(effects["scale"]["gradient"]["relative_change"] - 0.5) < 1e-6
    assert effects["shift"]["weights"]["trigger_rate"] == effects["boost"]["moment"]["trigger_rate"] == 1
    assert effects["scale"]["gradient"]["non_finite"] == 0


def case_explaining_under_fsdp2_works_or_is_refused_in_one_line(rank):
    model, optimizer, attachment = sharded([toys.Shift(), toys.Scale()])
    before = full_weights(model)
    try:
        rows = attachment.explain(toys.batch()).rows
    except RegradError as error:
        assert "\n" not in str(error)
    else:
        assert {row["correction"] for row in rows} == {"shift", "scale"}
    close(full_weights(model), before, 0)
    toys.train_step(model, optimizer)


def case_row_norms_and_total_norm_are_exact_on_shards(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    for shape in [(4, 6), (5, 3), (1, 4), (3, 2, 4), (6,), (1,)]:
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        for placement in [Replicate(), *(Shard(d) for d in range(len(shape)))]:
            tensor = distribute_tensor(whole.clone(), mesh, [placement])
            torch.testing.assert_close(total_norm([tensor]), whole.norm(), rtol=1e-13, atol=0)
            for axis in (None, *range(len(shape)), -1):
                expected = row_norms(whole, axis)
                kept = None if axis is None else axis % len(shape)
                if placement.is_shard() and placement.dim == kept:
                    expected = distribute_tensor(expected, mesh, [placement]).to_local()
                torch.testing.assert_close(row_norms(tensor, axis), expected, rtol=1e-13, atol=0)


def case_norms_of_plain_and_sharded_tensors_together_are_exact(rank):
    mesh, generator = init_device_mesh("cpu", (WORLD,)), torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(4, 6), (5, 3), (7,), ()]]
    placements = [Shard(0), Shard(1), Replicate()]
    tensors = [distribute_tensor(w, mesh, [p]) for w, p in zip(wholes, placements, strict=False)] + [wholes[-1]]
    expected = torch.cat([w.reshape(-1) for w in wholes]).norm()
    torch.testing.assert_close(total_norm(tensors), expected, rtol=1e-13, atol=0)


def case_the_norm_of_a_pending_sum_is_refused(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    pending = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    raises(ValueError, ["pending sum"], lambda: row_norms(pending))
    raises(ValueError, ["pending sum"], lambda: total_norm([pending]))


def run(rank, folder):
    warnings.simplefilter("error")
    results = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            store = distributed.FileStore(str(folder / name), WORLD)
            options = {"rank": rank, "world_size": WORLD, "timeout": PATIENCE}
            distributed.init_process_group("gloo", store=distributed.PrefixStore("group", store), **options)
            try:
                case(rank)
                results[name] = None
            except BaseException:
                results[name] = traceback.format_exc()
            store.set(f"done {rank}", "")
            store.wait([f"done {other}" for other in range(WORLD)], PATIENCE)
            distributed.destroy_process_group()
            (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
