import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_centralization.functional import Unit, centralize_, subtract_, unit_means
from regrad_testing import no_waiting
from torch import nn

SHAPES = [(3, 4), (4, 3, 5), (4, 1, 3, 3), (2, 3, 2, 2, 2), (3, 1)]


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_centralizing_is_that_of_the_reference_for_every_shape(shape, reference):
    grad = random(shape)
    expected = reference.centralize(grad, reference.outputs(nn.Linear(1, 1), shape))
    assert centralize_(grad) is grad
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


def test_centralizing_by_hand():
    grad = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]])
    expected = torch.tensor(
        [[[-2.0, -1.0], [0.0, 3.0]], [[-1.0, -1.0], [-1.0, 3.0]]]
    )  # means 3 and 1
    assert torch.equal(centralize_(grad), expected)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_what_has_no_rows_is_left_alone(shape):
    grad = random(shape)
    assert torch.equal(centralize_(grad.clone()), grad)


def test_a_centred_gradient_changes_no_bit():
    grad = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(centralize_(grad.clone()), grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_element_stays_within_its_row(bad):
    grad = random((3, 2))
    expected = centralize_(grad.clone())
    grad[1, 0] = bad
    centralize_(grad)
    assert torch.equal(grad[[0, 2]], expected[[0, 2]])
    assert not grad[1].isfinite().any()


def test_half_gradients_are_summed_in_float32():
    grad = torch.full((1, 4096), 60.0, dtype=torch.float16)  # the sum, 2.5e5, is no half number
    assert torch.equal(centralize_(grad), torch.zeros(1, 4096, dtype=torch.float16))
    grad = random((8, 9), dtype=torch.bfloat16)
    wide = centralize_(grad.float())
    assert torch.equal(centralize_(grad), wide.bfloat16())


def test_channels_last_and_contiguous_gradients_give_the_same():
    grad = random((4, 3, 2, 2))
    other = grad.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(centralize_(other), centralize_(grad), rtol=0, atol=1e-15)


@pytest.mark.parametrize("unit", [Unit(1), Unit(1, 2), Unit(1, 3), Unit(0, 2)])
def test_grouped_and_turned_units_are_those_of_the_parts(unit):
    grad = random((6, 4, 3))
    turn = (lambda t: t.transpose(0, 1)) if unit.axis else (lambda t: t)
    expected = torch.cat(
        [turn(centralize_(turn(part).clone())) for part in grad.chunk(unit.groups)]
    )
    if unit.axis == 0:  # an index of dimension 0 within its group
        expected = grad - torch.cat(
            [part.mean((1, 2), keepdim=True) for part in grad.chunk(unit.groups)]
        )
        unit = Unit(0)
    subtract_([grad], [unit_means(grad, unit)])
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
    power=st.integers(-20, 20),
)
def test_row_means_end_at_zero_and_differences_within_a_row_stay(shape, seed, power, reference):
    grad = random(shape, seed) * 2.0**power
    before = grad.clone()
    centralize_(grad)
    expected = reference.centralize(before, reference.outputs(nn.Linear(1, 1), tuple(shape)))
    size = before.abs().max().item()
    torch.testing.assert_close(grad, expected, rtol=0, atol=2e-15 * size)
    assert grad.flatten(1).mean(1).abs().max().item() <= 1e-15 * size
    shift = (before - grad).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=2e-15 * size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu_without_waiting():
    here = [random(shape, i) for i, shape in enumerate(SHAPES)]
    there = [t.cuda() for t in here]
    subtract_(here, [unit_means(t, Unit()) for t in here])
    with no_waiting():
        subtract_(there, [unit_means(t, Unit()) for t in there])
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-14)
