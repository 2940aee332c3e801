"""Norms of shards: every function here runs on two processes, see `test_processes.py`."""

import regrad
import torch
import toys
from regrad.sharding import reduce_gradients, reduce_states, row_norms, total_norm
from shared_cases import WORLD, raises
from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)


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
    wholes = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(4, 6), (5, 3), (7,), ()]
    ]
    placements = [Shard(0), Shard(1), Replicate()]
    tensors = [
        distribute_tensor(w, mesh, [p]) for w, p in zip(wholes, placements, strict=False)
    ] + [wholes[-1]]
    expected = torch.cat([w.reshape(-1) for w in wholes]).norm()
    torch.testing.assert_close(total_norm(tensors), expected, rtol=1e-13, atol=0)


def case_the_norm_of_a_pending_sum_is_refused(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    unreduced = pending(torch.ones(2, 2), mesh)
    raises(ValueError, ["pending sum"], lambda: row_norms(unreduced))
    raises(ValueError, ["pending sum"], lambda: total_norm([unreduced]))


def pending(numbers, mesh):
    """Return a tensor of which each of two ranks holds half, as a sum that is not taken yet."""
    return DTensor.from_local(numbers / WORLD, mesh, [Partial()])


def case_gradients_and_state_that_are_pending_sums_are_laid_out_as_the_parameter(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    numbers = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    for placement in (Replicate(), Shard(0), Shard(1)):
        parameter = nn.Parameter(distribute_tensor(numbers.clone(), mesh, [placement]))
        optimizer = toys.sgd(nn.ParameterList([parameter]))
        parameter.grad = pending(numbers, mesh)
        optimizer.step()
        parameter.grad = pending(numbers, mesh)
        reduce_gradients([parameter])
        reduce_states(optimizer)
        for tensor in (parameter.grad, optimizer.state[parameter]["momentum_buffer"]):
            assert tensor.placements == parameter.placements
            torch.testing.assert_close(tensor.full_tensor(), numbers, rtol=0, atol=0)
        kept = parameter.grad
        reduce_gradients([parameter])
        assert parameter.grad is kept


def case_the_optimizer_steps_with_the_corrected_sum(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = nn.Module()
    model.weight = nn.Parameter(
        distribute_tensor(torch.zeros(2, 2, dtype=torch.float64), mesh, [Replicate()])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attachment = regrad.attach(model, optimizer, [toys.UnitRows()])
    attachment.engine.forwards = 1
    model.weight.grad = pending(torch.tensor([[3.0, 4.0], [0.0, 2.0]]).double(), mesh)
    optimizer.step()
    wanted = torch.tensor([[3 / 5.001, 4 / 5.001], [0.0, 2 / 2.001]]).double()
    torch.testing.assert_close(model.weight.full_tensor().detach(), -wanted, rtol=1e-6, atol=0)
