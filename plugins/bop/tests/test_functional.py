import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_bop.functional import Evidence, bop2_, bop_

SHAPES = [(3,), (2, 5), (), (4, 0, 2)]
START = [1.0, -1.0, 1.0, -1.0, 1.0]
GRADIENTS = [
    [0.5, 0.5, -0.2, -0.3, 0.001],
    [0.4, -0.9, 0.3, -0.3, 0.002],
    [-2.0, -0.9, 0.6, 0.1, 0.004],
]
BOP = {"rate": 0.1, "threshold": 0.03}
BOP2 = {"rate": 0.1, "second_rate": 0.01, "threshold": 0.5}


def signs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [torch.where(values >= 0, 1.0, -1.0).double() for values in drawn]


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def zeros(like):
    return [torch.zeros_like(tensor) for tensor in like]


def oracle_tensors():
    return [torch.tensor(row, dtype=torch.float64) for row in [START, *GRADIENTS]]


def test_bop_follows_the_oracle():
    weight, *steps = oracle_tensors()
    moment = torch.zeros_like(weight)
    moments = [
        [0.05, 0.05, -0.02, -0.03, 0.0001],
        [0.085, -0.045, 0.012, -0.057, 0.00029],
        [-0.1235, -0.1305, 0.0708, -0.0413, 0.000661],
    ]
    # At step 1 the fourth weight sits at w·m = τ: it is kept, and flips at step 2.
    weights = [[-1, -1, 1, -1, 1], [-1, 1, 1, 1, 1], [1, 1, -1, 1, 1]]
    for gradient, wanted_moment, wanted in zip(steps, moments, weights, strict=True):
        bop_([weight], [gradient], [moment], **BOP)
        torch.testing.assert_close(moment.tolist(), wanted_moment, rtol=1e-12, atol=1e-15)
        assert weight.tolist() == wanted


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_weight_at_the_threshold_is_kept(weight):
    weights = [torch.tensor([weight])]
    bop_(weights, [torch.tensor([weight])], [torch.zeros(1)], rate=0.5, threshold=0.5)
    assert weights[0].item() == weight


def test_bop2_follows_the_oracle():
    weight, *steps = oracle_tensors()
    evidence = Evidence(first=zeros([weight]), second=zeros([weight]))
    weights = [[-1, -1, 1, 1, -1], [-1, -1, 1, 1, -1], [1, 1, -1, 1, -1]]
    for gradient, wanted in zip(steps, weights, strict=True):
        bop2_([weight], [gradient], evidence, **BOP2)
        assert weight.tolist() == wanted
    squares = [0.04403425, 0.01856925, 0.00488304, 0.00187309, 2.09401e-7]
    torch.testing.assert_close(evidence.second[0].tolist(), squares, rtol=1e-9, atol=0)


def test_the_unbiased_bop2_follows_its_oracle_which_differs_in_one_weight():
    weight, *steps = oracle_tensors()
    evidence = Evidence(first=zeros([weight]), second=zeros([weight]))
    for t, gradient in enumerate(steps, start=1):
        totals = [(1 - 0.9**t, 1 - 0.99**t)]
        bop2_([weight], [gradient], evidence, totals=totals, **BOP2)
    assert weight.tolist() == [-1, 1, -1, 1, -1]


@pytest.mark.parametrize("maximize", [False, True])
def test_bop_steps_are_those_of_the_reference(reference, maximize):
    weights = signs()
    moments = zeros(weights)
    for seed in range(1, 13):
        options = {"rate": 0.2, "threshold": 0.01, "maximize": maximize}
        bop_(weights, gradients(seed), moments, **options)
    for place, (got, start) in enumerate(zip(weights, signs(), strict=True)):
        plain = reference.Bop(**options)
        values = start.flatten().tolist()
        for seed in range(1, 13):
            values = plain.step(values, gradients(seed)[place].flatten().tolist())
        assert got.flatten().tolist() == values


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_bop2_steps_are_those_of_the_reference(reference, unbiased, maximize):
    weights = signs()
    evidence = Evidence(first=zeros(weights), second=zeros(weights))
    options = {"rate": 0.2, "second_rate": 0.05, "threshold": 0.3, "maximize": maximize}
    for t in range(1, 13):
        totals = [(1 - 0.8**t, 1 - 0.95**t)] * len(weights) if unbiased else None
        bop2_(weights, gradients(t), evidence, totals=totals, **options)
    for place, (got, start) in enumerate(zip(weights, signs(), strict=True)):
        plain = reference.Bop2(**options, unbiased=unbiased)
        values = start.flatten().tolist()
        for seed in range(1, 13):
            values = plain.step(values, gradients(seed)[place].flatten().tolist())
        assert got.flatten().tolist() == values


@given(
    gradients=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    rate=st.floats(0, 1),
    threshold=st.floats(0, 10),
)
def test_any_gradients_leave_signs_and_flip_only_what_the_moment_is_against(
    gradients, rate, threshold
):
    weights = [torch.ones(1, dtype=torch.float64)]
    moments = zeros(weights)
    for gradient in gradients:
        before = weights[0].item()
        step = [torch.tensor([gradient], dtype=torch.float64)]
        bop_(weights, step, moments, rate=rate, threshold=threshold)
        assert weights[0].item() in (-1.0, 1.0)
        assert (weights[0].item() != before) == (before * moments[0].item() > threshold)


def test_half_of_all_weights_flip_in_the_first_step_of_the_published_bop2():
    """The ratio is γ/√σ = 3.16e-6 for every weight, whatever its gradient; τ is 1e-6."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    weight = torch.where(torch.randn(20_000, generator=generator) >= 0, 1.0, -1.0)
    evidence = Evidence(first=zeros([weight]), second=zeros([weight]))
    for _ in range(30):
        before = weight.clone()
        noise = torch.randn(20_000, generator=generator)
        bop2_([weight], [noise], evidence, rate=1e-7, second_rate=1e-3, threshold=1e-6)
        shares.append((weight != before).double().mean().item())
    # The specification's numbers for pure noise; 4σ of a share of 20,000 is at most .014.
    known = {1: 0.50, 2: 0.17, 3: 0.12, 10: 0.046, 30: 0.019}
    assert {t: shares[t - 1] for t in known} == pytest.approx(known, abs=0.014)


def test_bop2_does_not_depend_on_the_scale_of_the_gradient_and_bop_does():
    flips = {}
    for scale in (1.0, 1e-3):
        ours = signs()
        theirs = signs()
        moments = zeros(ours)
        evidence = Evidence(first=zeros(ours), second=zeros(ours))
        for seed in range(1, 9):
            scaled = [scale * gradient for gradient in gradients(seed)]
            bop_(ours, scaled, moments, rate=0.1, threshold=1e-2)
            bop2_(theirs, scaled, evidence, rate=0.1, second_rate=0.01, threshold=0.5)
        flips[scale] = (torch.cat([w.flatten() for w in ours]).tolist(), theirs)
    assert flips[1.0][0] != flips[1e-3][0]
    assert all(torch.equal(a, b) for a, b in zip(flips[1.0][1], flips[1e-3][1], strict=True))


def test_a_tensor_that_may_not_flip_gathers_evidence_all_the_same():
    weights = signs()
    evidence = Evidence(first=zeros(weights), second=zeros(weights))
    held = [False] * len(weights)
    bop2_(weights, gradients(1), evidence, rate=0.1, threshold=0.0, may_flip=held)
    assert all(torch.equal(a, b) for a, b in zip(weights, signs(), strict=True))
    wanted = [0.1 * gradient for gradient in gradients(1)]
    assert all(torch.allclose(a, b) for a, b in zip(evidence.first, wanted, strict=True))


def test_no_gradient_no_flip_and_no_nan():
    weights = signs()
    evidence = Evidence(first=zeros(weights), second=zeros(weights))
    for _ in range(3):
        bop2_(weights, zeros(weights), evidence, rate=0.1, threshold=0.0)
    bop_(weights, zeros(weights), zeros(weights), rate=0.1, threshold=0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, signs(), strict=True))


class OnDevice(torch.Tensor):
    """Says that it is not on a CPU, so that it must not be read."""

    is_cpu = False

    def item(self):
        raise AssertionError("read from the device")

    __float__ = __bool__ = item


@pytest.mark.parametrize("kind", [torch.Tensor, OnDevice])
def test_a_tensor_rate_gives_the_numbers_of_a_number_and_is_not_read_on_a_device(kind):
    results = []
    for rate in (0.1, torch.tensor([0.1], dtype=torch.float64).as_subclass(kind)):
        weights = signs()
        moments = zeros(weights)
        evidence = Evidence(first=zeros(weights), second=zeros(weights))
        for seed in range(1, 6):
            bop_(weights, gradients(seed), moments, rate=rate, threshold=0.01)
            bop2_(signs(), gradients(seed), evidence, rate=rate, threshold=0.1)
        results.append([*weights, *moments, *evidence.first])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.as_subclass(torch.Tensor), rtol=1e-14, atol=1e-15)
