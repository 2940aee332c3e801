import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad_adafisher.functional import (
    advance,
    channel_sums,
    normalise,
    relative_divisor,
    sum_of_patch_squares,
    sum_of_squares,
    sum_over_rows,
)
from torch.nn import functional


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_sums_are_over_every_dimension_but_one(axis):
    tensor = random(2, 3, 4)
    others = [d for d in range(3) if d != axis % 3]
    torch.testing.assert_close(sum_over_rows(tensor, axis=axis), tensor.sum(dim=others))
    torch.testing.assert_close(sum_of_squares(tensor, axis=axis), tensor.square().sum(dim=others))


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (2, 3)},
        {"kernel_size": (3, 3), "stride": (2, 1), "padding": (1, 1, 2, 2)},
        {"kernel_size": (2, 2), "dilation": (3, 2), "padding": (1, 1, 1, 1)},
        {"kernel_size": (1, 1), "stride": (2, 2)},
        {"kernel_size": (3, 2), "stride": (3, 2), "dilation": (2, 1)},
    ],
    ids=str,
)
def test_sums_over_patches_are_those_of_torchs_unfold(geometry):
    images = random(2, 3, 8, 7)
    left, _, top, _ = geometry.get("padding", (0, 0, 0, 0))
    unfolded = functional.unfold(
        images,
        geometry["kernel_size"],
        dilation=geometry.get("dilation", 1),
        padding=(top, left),
        stride=geometry.get("stride", 1),
    )
    wanted = unfolded.square().sum(dim=(0, 2))
    torch.testing.assert_close(sum_of_patch_squares(images, **geometry), wanted)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_sums_over_patches_know_every_way_of_padding(mode):
    images = random(2, 3, 5, 6)
    name = "constant" if mode == "zeros" else mode
    padded = functional.pad(images, (1, 2, 2, 1), mode=name)
    wanted = functional.unfold(padded, (3, 2)).square().sum(dim=(0, 2))
    sums = sum_of_patch_squares(images, kernel_size=(3, 2), padding=(1, 2, 2, 1), padding_mode=mode)
    torch.testing.assert_close(sums, wanted)


def test_channel_sums_are_divided_by_the_squared_number_of_positions():
    inputs = random(2, 3, 4, 5)
    torch.testing.assert_close(channel_sums(inputs), inputs.sum(dim=(0, 2, 3)) / 400)
    torch.testing.assert_close(channel_sums(inputs[..., 0, 0]), inputs[..., 0, 0].sum(dim=0))


def test_infinities_count_as_one_and_zero():
    values = torch.tensor([0.5, torch.inf, -torch.inf])
    torch.testing.assert_close(normalise(values), torch.tensor([0.5, 1.0, 0.0]) / (1 + 1e-6))


def test_equal_values_and_zeros_become_zeros_with_either_floor():
    for relative in (False, True):
        assert normalise(torch.full((3,), 2.0), relative=relative).tolist() == [0, 0, 0]
        assert normalise(torch.zeros(3), relative=relative).tolist() == [0, 0, 0]


def test_only_the_absolute_floor_depends_on_the_scale_of_the_loss():
    values = random(5).square() * 1e-4
    absolute = [normalise(values * factor).max().item() for factor in (1.0, 2.0**-16)]
    relative = [normalise(values * f, relative=True).max().item() for f in (1.0, 2.0**-16)]
    assert absolute[0] > 0.98
    assert absolute[1] < 0.01
    assert relative[0] == relative[1] == pytest.approx(1, abs=2e-6)


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
    average=st.sampled_from(["published", "ema"]),
    refreshes=st.integers(1, 3),
)
def test_averages_follow_the_reference(values, average, refreshes, reference):
    fisher = reference.Fisher(average)
    moment = torch.tensor(values, dtype=torch.float64)
    ours = theirs = None
    for _ in range(refreshes):
        ours = advance(ours, moment, average=average)
        theirs = fisher.advanced(theirs, values)
    torch.testing.assert_close(
        ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_a_nan_leaves_the_average_as_it_was():
    before = torch.tensor([0.25, 0.5])
    moment = torch.tensor([1.0, torch.nan])
    for average in ("published", "ema"):
        assert torch.equal(advance(before, moment, average=average), before)
        assert advance(None, moment, average=average).isfinite().all()


def test_the_published_average_is_not_convex_and_reaches_its_bounds():
    """Its weights sum to .088: whatever the data, F is constant to 8 % after a few refreshes."""
    low = high = None
    bounds = []
    for _ in range(20):
        low = advance(low, torch.zeros(2, dtype=torch.float64))
        high = advance(high, torch.tensor([0.0, torch.inf], dtype=torch.float64))
        bounds.append((low.max().item() ** 2 + 1e-3, high.max().item() ** 2 + 1e-3))
    known = [(0.0074, 0.008744), (0.00104096, 0.0012262), (0.00100026, 0.0010847)]
    for found, wanted in zip(bounds, known, strict=False):
        assert found == pytest.approx(wanted, rel=5e-5)
    ratios = [largest / smallest for smallest, largest in bounds]
    assert ratios[2] == pytest.approx(1.0844, abs=5e-4)
    assert max(ratios[3:]) == pytest.approx(1.0763, abs=5e-4)
    assert bounds[-1] == pytest.approx((0.001, 0.0010756), rel=5e-5)


def test_the_divisor_is_the_one_worked_out_by_hand():
    divisor = relative_divisor(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.5]), damping=0.01)
    torch.testing.assert_close(divisor, torch.tensor([[1.0, 6.0], [1.0, 11.0]]))


def test_a_huge_damping_divides_by_exactly_one():
    assert (relative_divisor(torch.ones(2), torch.ones(3), damping=1e30) == 1).all()
    assert math.isfinite(relative_divisor(torch.ones(1), torch.ones(1), damping=1e-30).item())
