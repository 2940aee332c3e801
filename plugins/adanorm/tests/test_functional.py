import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_adanorm.functional import add_scaled_, average_and_excess, norms_of
from regrad_testing import no_waiting


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@given(
    norms=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40),
    decay=st.floats(0, 0.999),
)
def test_the_rule_on_norms_is_that_of_the_reference_on_gradients(norms, decay, reference):
    rule, average = reference.Rule(decay), torch.zeros(1, dtype=torch.float64)
    for norm in norms:
        expected = rule(vector(0.6 * norm, -0.8 * norm))
        average, excess = average_and_excess(vector(norm), average, decay=decay)
        assert average.item() == pytest.approx(rule.average, rel=1e-12)
        # a norm within a rounding of its average may be called short by one and not by the other
        torch.testing.assert_close(
            (1 + excess) * vector(0.6 * norm, -0.8 * norm), expected, rtol=1e-11, atol=0
        )


def test_averages_and_excesses_are_those_worked_out_by_hand():
    # γ = .9, e = 2: norm 1 → e = 1.9, x = .9; norm 3 → e = 2.1, not short; norm 2 → e = 2, not short
    average, excess = average_and_excess(vector(1.0, 3.0, 2.0), vector(2.0, 2.0, 2.0), decay=0.9)
    torch.testing.assert_close(average, vector(1.9, 2.1, 2.0), rtol=0, atol=1e-15)
    torch.testing.assert_close(excess, vector(0.9, 0.0, 0.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("drop", "steps"), [(0.5, 14), (0.9, 45), (0.99, 90)])
def test_from_zero_it_takes_14_45_or_90_steps_until_a_drop_fires(drop, steps):
    def fires_after(count):
        average = vector(0.0)
        for _ in range(count):
            average, excess = average_and_excess(vector(1.0), average)
            assert not excess.any()
        return average_and_excess(vector(drop), average)[1].item() > 0

    assert not any(fires_after(count) for count in range(steps))
    assert all(fires_after(count) for count in range(steps, steps + 20))


def test_no_memory_changes_nothing():
    norms = vector(1.0, 0.5, 1e-300, 7.0)
    average, excess = average_and_excess(norms, vector(9.0, 9.0, 9.0, 9.0), decay=0.0)
    assert torch.equal(average, norms)
    assert not excess.any()


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_leaves_the_average_alone(norm):
    average, excess = average_and_excess(vector(norm), vector(2.0))
    assert (average.item(), excess.item()) == (2.0, 0.0)


def test_a_zero_norm_decays_the_average_and_has_no_excess():
    average, excess = average_and_excess(vector(0.0), vector(2.0), decay=0.5)
    assert (average.item(), excess.item()) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_are_summed_in_float32_at_least(dtype):
    tensors = [
        torch.full((4096,), 0.25, dtype=dtype),
        torch.full((3, 0), 1.0, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    norms = norms_of(tensors)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms, torch.tensor([16.0, 0.0, 1.0], dtype=norms.dtype))


class OnDevice(torch.Tensor):
    """Says that it is not on a CPU, so that the branch for devices runs."""

    device = torch.device("meta")


def test_a_device_gives_the_numbers_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 5), ()]
    x, y = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2)
    )
    factors = vector(0.5, 0.0, -2.0)
    expected = [a + f * b for a, b, f in zip(x, y, factors, strict=True)]
    other = [t.clone() for t in x]
    add_scaled_(x, y, factors)
    add_scaled_(other, y, factors.as_subclass(OnDevice))
    for a, b, want in zip(x, other, expected, strict=True):
        torch.testing.assert_close(a, want, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(b.as_subclass(torch.Tensor), want, rtol=1e-15, atol=1e-15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu_without_a_synchronisation():
    generator = torch.Generator().manual_seed(0)
    here = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(3,), (2, 5), ()]]
    there = [t.cuda() for t in here]
    results = []
    for tensors in (here, there):
        averages = torch.full((3,), 9.0, dtype=torch.float64, device=tensors[0].device)
        with no_waiting():
            average, excess = average_and_excess(norms_of(tensors), averages)
            add_scaled_(tensors, tensors, excess)
        results.append([average.cpu(), *(t.cpu() for t in tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
