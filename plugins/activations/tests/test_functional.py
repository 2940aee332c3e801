"""The rules for one matrix, against the paper's in loops and numbers worked out there."""

import math

import pytest
import torch
from regrad_activations.functional import (
    choose_by_weight,
    choose_uniformly,
    dequantise,
    quantise,
    row_probabilities,
    sampled_sum,
    winners,
)

TIMES = torch.arange(1, 33, dtype=torch.float64)
INPUTS = torch.stack([TIMES.sin(), (2 * TIMES).cos(), TIMES / 32], 1) * (-TIMES / 6).exp()[:, None]
GRADIENTS = torch.stack([TIMES.cos(), (3 * TIMES).sin()], 1) * (-TIMES / 8).exp()[:, None]
COUNT = 8


def close(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64),
        torch.as_tensor(wanted, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def known():
    """Return probabilities by the true gradients, falling, and their order."""
    norms = INPUTS.norm(dim=1) * GRADIENTS.norm(dim=1)
    return row_probabilities(norms)


def estimate(indices, weights):
    restored = sampled_sum(INPUTS.shape, indices, INPUTS[indices] * weights.reshape(-1, 1))
    return GRADIENTS.T @ restored


def test_the_oracle_of_thirty_two_rows(reference):
    close(
        GRADIENTS.T @ INPUTS,
        [[0.1558208624, -0.3164298816, -0.0269512499], [0.0071355301, 0.1027847042, 0.0001962302]],
    )
    ordered, order = known().sort(descending=True, stable=True)
    close(ordered[:4], [0.18964783, 0.17049147, 0.13651069, 0.09218831], 1e-8)
    certain, scores = winners(ordered, COUNT)
    close(
        scores,
        [
            *(0.125, 0.1157646, 0.10664345, 0.10067),
            *(0.10279042, 0.10723297, 0.11898205, 0.18380436),
        ],
        1e-7,
    )
    close(scores, reference.scores(ordered.tolist(), COUNT), 1e-12)
    assert certain.item() == reference.certain_number(ordered.tolist(), COUNT) == 3
    assert (order[:3] + 1).tolist() == [3, 1, 2]


def test_the_oracle_of_five_rows():
    inputs = torch.tensor([[4, 0], [0, 2], [1, 1], [0.5, 0], [0, 0.25]], dtype=torch.float64)
    gradients = torch.tensor([1, 1, 1, 2, 1], dtype=torch.float64)
    probabilities = row_probabilities(inputs.norm(dim=1) * gradients)
    close(
        probabilities,
        [0.4616691372, 0.2308345686, 0.1632246888, 0.1154172843, 0.0288543211],
    )
    certain, scores = winners(probabilities, 3)
    close(scores, [0.33333333, 0.26916543, 0.30749629], 1e-8)
    assert certain.item() == 1
    weights = {1: 1.1660533906, 2: 1.6490485194, 3: 2.3321067812, 4: 9.3284271247}
    seen = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        rows, found, _ = choose_by_weight(probabilities, 3, generator=generator)
        assert rows[0] == 0
        assert found[0] == 1
        seen |= dict(zip(rows[1:].tolist(), found[1:].tolist(), strict=True))
    assert seen.keys() == weights.keys()
    for row, weight in seen.items():
        assert math.isclose(weight, weights[row], abs_tol=1e-9)


def test_the_variances_are_those_of_the_oracle(reference):
    ordered, order = known().sort(descending=True, stable=True)
    told = (GRADIENTS.tolist(), INPUTS.tolist())
    falling, places = ordered.tolist(), order.tolist()
    close(reference.variance(*told, falling, places, COUNT, 3), 0.2611215245)
    close(reference.variance(*told, falling, places, COUNT, 0), 0.6432395922)
    close(reference.variance_of_uniform(*told, COUNT), 1.86735, 1e-5)


@pytest.mark.parametrize(("kind", "variance"), [("wta", 0.2611215245), ("uniform", 1.8673461)])
def test_the_mean_of_draws_is_the_exact_gradient_and_their_spread_the_formulas(kind, variance):
    draws = 3000
    generator = torch.Generator().manual_seed(1)
    exact = GRADIENTS.T @ INPUTS
    errors = []
    for _ in range(draws):
        if kind == "wta":
            indices, weights, _ = choose_by_weight(known(), COUNT, generator=generator)
        else:
            indices = choose_uniformly(32, COUNT, generator=generator)
            weights = torch.full((COUNT,), 32 / COUNT, dtype=torch.float64)
        errors.append(estimate(indices, weights) - exact)
    found = torch.stack(errors)
    # E|mean error|² is variance / draws; Markov would allow more, a sum of six normal parts less.
    assert found.mean(dim=0).norm() < 4 * math.sqrt(variance / draws)
    squares = found.square().sum(dim=(1, 2))
    assert abs(squares.mean() - variance) < 4 * squares.std() / math.sqrt(draws)


@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-9, 1e-30])
def test_small_norms_have_probabilities_of_sum_one_and_no_weight_below_zero(size):
    probabilities = row_probabilities(torch.full((8192,), size))
    close(probabilities.sum(), 1, 1e-12)
    _, weights, _ = choose_by_weight(probabilities, 100)
    assert (weights > 0).all()


def test_all_rows_of_zeros_are_drawn_uniformly():
    close(row_probabilities(torch.zeros(5)), [0.2] * 5)


def test_with_few_rows_that_are_not_zero_they_are_certain_and_nothing_else_counts():
    probabilities = row_probabilities(torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0]))
    indices, weights, certain = choose_by_weight(probabilities, 4)
    assert weights.isfinite().all()
    restored = sampled_sum(torch.Size([6, 1]), indices, weights[:, None])
    close(restored[:, 0], [0, 1, 0, 1, 0, 0])
    assert certain.item() == 2


def test_quantised_rows_are_the_references_and_near(reference):
    matrix = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    matrix[3] = 0
    restored = dequantise(*quantise(matrix), dtype=torch.float64)
    close(restored, [reference.quantised(row) for row in matrix.tolist()], 1e-15)
    bound = matrix.abs().amax(dim=1, keepdim=True) / 254 + 1e-15
    assert ((restored - matrix).abs() <= bound).all()
    assert not restored[3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantised_rows_come_back_in_their_dtype(dtype):
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    integers, scales = quantise(matrix)
    assert integers.dtype is torch.int8
    assert scales.dtype is torch.promote_types(dtype, torch.float32)
    restored = dequantise(integers, scales, dtype=dtype)
    assert restored.dtype is dtype
    far = (restored.double() - matrix.double()).abs().amax(dim=1)
    assert (far <= matrix.double().abs().amax(dim=1) * (1 / 254 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_comes_back_so_and_the_others_are_not_touched(value):
    matrix = torch.tensor([[1.0, value, 2.0], [127.0, 0.0, -3.0]])
    restored = dequantise(*quantise(matrix), dtype=torch.float32)
    assert restored[0].isnan().all()
    assert restored[1].tolist() == [127.0, 0.0, -3.0]
