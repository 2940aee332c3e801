"""Norms of whole tensors; those of shards are in `cases_shards.py`."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad.sharding import row_norms, total_norm

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def filled(shape, dtype, seed):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def looped(tensor, axis):
    """Sum squares one number at a time."""
    squares = {}
    for index in itertools.product(*map(range, tensor.shape)):
        unit = index[axis] if axis is not None and tensor.dim() else 0
        squares[unit] = squares.get(unit, 0.0) + float(tensor[index]) ** 2
    return [math.sqrt(squares[unit]) for unit in sorted(squares)]


@settings(deadline=None)
@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 10), data=st.data())
def test_row_norms_are_those_of_a_loop_for_every_axis(shape, dtype, seed, data):
    tensor = filled(shape, dtype, seed)
    axis = data.draw(st.sampled_from([None, *range(len(shape)), *(range(-len(shape), 0))]))
    norms = row_norms(tensor, axis)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert norms.flatten().tolist() == pytest.approx(
        looped(tensor.double(), axis), rel=tolerance, abs=1e-30
    )
    assert norms.dtype is torch.promote_types(dtype, torch.float32)
    expected = tuple(
        size if axis is not None and d == axis % len(shape) else 1 for d, size in enumerate(shape)
    )
    assert tuple(norms.shape) == expected
    assert torch.broadcast_shapes(norms.shape, tensor.shape) == tensor.shape


@settings(deadline=None)
@given(many=st.lists(st.tuples(shapes, dtypes), max_size=4), seed=st.integers(0, 10))
def test_the_total_norm_is_that_of_all_numbers_together(many, seed):
    tensors = [filled(shape, dtype, seed + i) for i, (shape, dtype) in enumerate(many)]
    numbers = [value for tensor in tensors for value in tensor.double().flatten().tolist()]
    # One tensor in half precision bounds what the sum can be known to.
    assert float(total_norm(tensors)) == pytest.approx(
        math.sqrt(sum(v * v for v in numbers)), rel=1e-2, abs=1e-30
    )


def test_the_total_norm_in_double_precision_is_exact():
    tensors = [filled((5, 3), torch.float64, 0), filled((7,), torch.float64, 1)]
    expected = torch.cat([t.flatten() for t in tensors]).norm()
    torch.testing.assert_close(total_norm(tensors), expected, rtol=1e-14, atol=0)


def test_the_total_norm_of_half_precision_tensors_is_computed_in_single_precision():
    # 300 squared is past the largest float16.
    assert total_norm([torch.full((4,), 300.0, dtype=torch.float16)]).item() == pytest.approx(600.0)
    assert total_norm([torch.full((4,), 300.0, dtype=torch.float16)]).dtype is torch.float32


def test_three_and_four_are_five():
    assert row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [[5.0], [2.0]]
    assert row_norms(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), axis=1).tolist() == [[5.0, 2.0]]
    assert row_norms(torch.tensor([[3.0, 0.0], [4.0, 12.0]]), axis=None).tolist() == [[13.0]]
    assert total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == 5


def test_no_tensors_have_norm_zero():
    assert total_norm([]).item() == 0


def test_norms_record_no_graph():
    tensor = torch.ones(2, 2, requires_grad=True)
    assert not row_norms(tensor).requires_grad
    assert not total_norm([tensor]).requires_grad
