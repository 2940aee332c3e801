"""Norms of shards: every function here runs on two processes, see `test_processes.py`."""

import torch
from regrad.sharding import row_norms, total_norm
from shared_cases import WORLD, raises
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
    pending = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    raises(ValueError, ["pending sum"], lambda: row_norms(pending))
    raises(ValueError, ["pending sum"], lambda: total_norm([pending]))
