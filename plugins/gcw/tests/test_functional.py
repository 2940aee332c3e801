import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_gcw import functional

NAN = math.nan


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_slots_are_the_bias_corrected_averages_of_the_gradients_before():
    decays, gradients = (0.0, 0.9, 0.98), draw(40, 6)
    history, raw = (
        torch.zeros(4, 6, dtype=torch.float64),
        [torch.zeros(6, dtype=torch.float64) for _ in decays],
    )
    for seen, gradient in enumerate(gradients):
        functional.roll_(history, gradient, decays=decays, seen=seen)
        if seen:
            raw = [d * e + (1 - d) * gradients[seen - 1] for d, e in zip(decays, raw, strict=True)]
            for slot, d, e in zip(history[1:], decays, raw, strict=True):
                torch.testing.assert_close(slot, e / (1 - d**seen), rtol=1e-12, atol=1e-14)
        else:
            assert not history[1:].any()
        assert torch.equal(history[0], gradient)
    assert torch.equal(history[1], gradients[-2])


def test_slots_by_hand():
    history = torch.zeros(2, 1, dtype=torch.float64)
    for seen, value in enumerate([1.0, 2.0, 4.0]):
        functional.roll_(history, torch.tensor([value]), decays=[0.9], seen=seen)
    # e = .9·(.1·1) + .1·2 = .29 over 1 − .81
    assert history[:, 0].tolist() == pytest.approx([4.0, 0.29 / 0.19], abs=1e-15)


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_slots():
    history = torch.zeros(2, 3)
    for seen in range(3):
        functional.roll_(history, torch.tensor([math.inf, NAN, 1.0]), decays=[0.9], seen=seen)
    assert history.isfinite().all()


@given(seed=st.integers(0, 50), count=st.integers(1, 3))
def test_the_offset_is_the_sum_over_slots(seed, count):
    gradient, slots, a = (
        draw(2, 3, seed=seed),
        draw(count, 6, seed=seed + 1),
        draw(count, seed=seed + 2),
    )
    expected = sum(a[k] * (gradient - slots[k].view(2, 3)) for k in range(count))
    torch.testing.assert_close(
        functional.offset(gradient, slots, a), expected, rtol=1e-12, atol=1e-13
    )
    kept = gradient + functional.offset(gradient, slots, a, keep_norm=True)
    whole = gradient + expected
    torch.testing.assert_close(kept, whole * gradient.norm() / whole.norm(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_coefficients_of_zero_are_no_offset_bit_for_bit(keep_norm):
    for gradient in (draw(5), torch.zeros(5, dtype=torch.float64)):
        change = functional.offset(
            gradient, draw(3, 5), torch.zeros(3, dtype=torch.float64), keep_norm=keep_norm
        )
        assert torch.equal(gradient + change, gradient)


def test_an_offset_takes_a_gradient_of_lower_precision():
    change = functional.offset(
        torch.ones(2, dtype=torch.bfloat16), torch.zeros(1, 2), torch.tensor([0.5])
    )
    assert change.dtype == torch.float32
    assert change.tolist() == [0.5, 0.5]


def test_the_gram_matrix_holds_every_inner_product():
    history, following = draw(4, 7), draw(7, seed=1)
    rows = [*history, following]
    expected = torch.tensor([[torch.dot(a, b) for a in rows] for b in rows], dtype=torch.float64)
    torch.testing.assert_close(
        functional.gram(history, following), expected, rtol=1e-12, atol=1e-13
    )


def test_evidence_is_that_of_the_vectors():
    history, following = draw(4, 7), draw(7, seed=1)
    products, cosines = functional.evidence(functional.gram(history, following))
    for k in range(3):
        apart = history[0] - history[1 + k]
        assert products[k].item() == pytest.approx(torch.dot(following, apart).item(), rel=1e-12)
        assert cosines[k].item() == pytest.approx(
            torch.cosine_similarity(following, apart, dim=0).item(), rel=1e-12
        )


def test_evidence_of_zero_gradients_is_zero_and_of_infinite_ones_missing():
    products, cosines = functional.evidence(functional.gram(torch.zeros(3, 4), torch.zeros(4)))
    assert products.tolist() == cosines.tolist() == [0.0, 0.0]
    products, cosines = functional.evidence(
        functional.gram(torch.ones(3, 4), torch.full((4,), math.inf))
    )
    assert products.isnan().all()
    assert cosines.isnan().all()


def test_features_by_hand():
    # g = (3, 4), M = (0, 10): cosine .8, length ratio 2
    history = torch.tensor([[3.0, 4.0], [0.0, 10.0]], dtype=torch.float64)
    f = functional.features(functional.gram(history, history[0]))
    expected = torch.tensor(
        [[1.0, 0.0, 1.0, 0.0], [0.8, math.log(2), 0.0, 1.0]], dtype=torch.float64
    )
    torch.testing.assert_close(f, expected)
    assert functional.features(torch.zeros(3, 3)).isfinite().all()


def test_the_slot_fit_by_hand_and_its_bounds():
    cosines = torch.tensor([[[0.4, -1.0], [0.2, -1.0], [NAN, NAN]]])
    fitted = functional.fit_slot(torch.tensor([[0.9, -0.8]]), cosines)
    assert fitted.flatten().tolist() == pytest.approx([1.05, -1.0])
    assert functional.fit_slot(torch.tensor([[1.9]]), torch.tensor([[[1.0]]])).item() == 2.0
    assert functional.fit_slot(
        torch.tensor([[0.3]]), torch.tensor([[[NAN]]])
    ).item() == pytest.approx(0.3)


def module(count=1, slots=3):
    return [
        draw(count, 8),
        draw(count, 8, slots + 3, seed=1),
        torch.zeros(count, dtype=torch.float64),
    ]


def test_attention_at_scale_zero_is_the_prior_and_shares_sum_to_none():
    features, prior = draw(1, 4, 6, seed=2), torch.tensor([[0.9, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(functional.attend(module(), features, prior), prior)
    query, key, _ = module()
    uniform = functional.attend([0 * query, key, torch.ones(1)], features, prior)
    torch.testing.assert_close(uniform, prior, rtol=0, atol=1e-15)


def test_the_attention_fit_moves_towards_slots_that_agree_and_leaves_its_arguments_alone():
    features, prior = draw(1, 4, 6, seed=2), torch.zeros(1, 3, dtype=torch.float64)
    cosines = torch.tensor([[[0.9, -0.5, -0.5]]], dtype=torch.float64)
    start = module()
    before = [t.clone() for t in start]
    fitted = functional.fit_attention(start, features, cosines, prior)
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))

    def agreement(a):
        return (a * cosines.mean(dim=1) - a.square() / 2).sum().item()

    assert agreement(functional.attend(fitted, features, prior)) > agreement(
        functional.attend(start, features, prior)
    )


def test_each_tensor_learns_as_if_it_were_alone():
    features, prior, cosines = (
        draw(2, 4, 6, seed=2),
        draw(2, 3, seed=3),
        draw(2, 5, 3, seed=4).clamp(-1, 1),
    )
    together = functional.fit_attention(module(2), features, cosines, prior)
    alone = functional.fit_attention(
        [t[1:] for t in module(2)], features[1:], cosines[1:], prior[1:]
    )
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("prior", "learned", "use_learned", "is_on"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], True, True),
        ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0], False, True),
        (
            [-1.0, 0.5, 0.2],
            [-2.0, -2.0, -2.0],
            False,
            True,
        ),  # below zero by less than one standard error
        ([-1.0, -1.1, -0.9], [-2.0, -2.0, -2.0], False, False),
        (
            [-3.0, -3.1, -2.9],
            [-2.0, -2.1, -1.9],
            True,
            False,
        ),  # better than the prior, and uphill all the same
        ([-5.0, NAN, NAN], [-6.0, NAN, NAN], False, True),  # one row has no standard error
        ([NAN, NAN, NAN], [NAN, NAN, NAN], False, True),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False, True),
    ],
)
def test_the_gate_prefers_what_points_downhill(prior, learned, use_learned, is_on):
    gains = torch.tensor([prior, learned]).T[None]
    chosen, on = functional.gate(gains)
    assert (chosen.item(), on.item()) == (use_learned, is_on)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu():
    history, following, a = draw(4, 70), draw(70, seed=1), draw(3, seed=2)
    here = functional.gram(history, following), functional.offset(following, history[1:], a)
    there = [t.cuda() for t in (history, following, a)]
    for mine, theirs in zip(
        here,
        (functional.gram(*there[:2]), functional.offset(there[1], there[0][1:], there[2])),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-12, atol=1e-12)
