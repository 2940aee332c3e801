"""FSDP2: every function here runs on two processes, see `test_processes.py`."""

import contextlib
import itertools

import regrad
import torch
import toys
from regrad import RegradError
from shared_cases import STEPS, WORLD, alone, close, every_stage, full, full_weights, raises, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


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
    plain, moved = toys.Net(), toys.moved(toys.Net(), 0.5)
    for reshard, nested in itertools.product((True, False), repeat=2):
        model, *_ = sharded([toys.Shift(amount=0.5)], reshard=reshard, nested=nested)
        for reshard_after_backward in (True, False, False):
            model.set_reshard_after_backward(reshard_after_backward)
            model.train()
            loss = toys.loss_of(model)
            torch.testing.assert_close(loss, toys.loss_of(moved), rtol=0, atol=1e-14)
            loss.backward()
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(
                    toys.loss_of(model), toys.loss_of(plain), rtol=0, atol=1e-14
                )
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
    assert (
        effects["shift"]["weights"]["trigger_rate"]
        == effects["boost"]["moment"]["trigger_rate"]
        == 1
    )
    assert effects["scale"]["gradient"]["non_finite"] == 0


def case_explaining_under_fsdp2_is_refused_and_changes_nothing(rank):
    model, optimizer, attachment = sharded([toys.Shift(), toys.Scale()])
    before = full_weights(model)
    raises(
        RegradError,
        ["cannot be copied", "before fully_shard()"],
        lambda: attachment.explain(toys.batch()),
    )
    close(full_weights(model), before, 0)
    toys.train_step(model, optimizer)
