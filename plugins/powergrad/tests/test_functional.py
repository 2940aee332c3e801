"""The gradient and the value, against the paper's rule, the identity, and numbers worked by hand.

`torch.autograd.gradcheck` has no place here: by design the gradient is not the derivative of the value.
"""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad_powergrad import functional
from regrad_powergrad.functional import power_grad_cross_entropy
from torch.nn import functional as F

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "weight and smoothing": {"weight": WEIGHT, "label_smoothing": 0.2},
    "ignored class": {"ignore_index": 2},
    "everything": {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 2},
}
SHAPES = [(5,), (6, 5), (1, 5), (3, 5, 4), (2, 5, 3, 2)]
TILES = [1, 41, 2**21]


def draw(shape, generator, *, soft=False):
    """Return float64 logits of `shape` with 5 classes, and a target for them with one ignored row."""
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    if soft:
        return logits, torch.rand(shape, generator=generator, dtype=torch.float64)
    rows = () if len(shape) == 1 else shape[:1] + shape[2:]
    target = torch.randint(5, rows, generator=generator)
    if target.numel() > 1:
        target.view(-1)[0] = -100
    return logits, target


def gradient_of(logits, target, *, upstream=None, **options):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(
        power_grad_cross_entropy(logits, target, **options), logits, upstream
    )[0]


def as_rows(tensor):
    """Return [N, C, d1, ...] as a list of rows with C numbers."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1]).tolist()


CASES = [
    (name, soft)
    for name in OPTIONS
    for soft in (False, True)
    if not soft or "ignore_index" not in OPTIONS[name]
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("name", "soft"), CASES)
def test_gradient_and_value_are_the_papers(name, soft, reduction, generator, reference):
    options = {**OPTIONS[name], "reduction": reduction}
    logits, target = draw((3, 5, 4), generator, soft=soft)
    if "ignore_index" in options:
        target = target.masked_fill(target == -100, 2)
    upstream = torch.randn(
        (3, 4) if reduction == "none" else (), generator=generator, dtype=torch.float64
    )

    value = power_grad_cross_entropy(logits, target, alpha=0.3, **options)
    gradient = gradient_of(logits, target, alpha=0.3, upstream=upstream, **options)

    if "weight" in options:
        options["weight"] = WEIGHT.tolist()
    rows, targets = as_rows(logits), as_rows(target) if soft else target.flatten().tolist()
    losses = reference.cross_entropy(rows, targets, **options)
    scale = upstream.flatten().tolist() if reduction == "none" else upstream.item()
    expected = reference.gradient(rows, targets, alpha=0.3, upstream=scale, **options)
    assert torch.allclose(
        torch.tensor(as_rows(gradient)), torch.tensor(expected), rtol=1e-13, atol=1e-14
    )
    assert torch.allclose(
        value.flatten(), torch.tensor(losses, dtype=torch.float64).flatten(), rtol=1e-13
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_layout_and_tile_gives_the_same(tile, shape, soft, reduction, generator, oracle):
    logits, target = draw(shape, generator, soft=soft)
    options = {"weight": WEIGHT, "label_smoothing": 0.1, "reduction": reduction}
    plain = F.cross_entropy(logits, target, **options)
    upstream = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    with mock.patch.object(functional, "CPU_TILE", tile):
        value = power_grad_cross_entropy(logits, target, alpha=0.25, **options)
        gradient = gradient_of(logits, target, alpha=0.25, upstream=upstream, **options)
    assert value.shape == plain.shape
    assert torch.allclose(value, plain, rtol=1e-15, atol=0)
    expected = oracle(logits, target, alpha=0.25, upstream=upstream, **options)
    assert torch.allclose(gradient, expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_has_the_very_bits_of_torchs_loss(tile, shape, generator):
    logits, target = draw(shape, generator)
    logits = logits.float()
    with mock.patch.object(functional, "CPU_TILE", tile):
        value = power_grad_cross_entropy(logits, target, reduction="none")
    assert torch.equal(value, F.cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize("classes", [5, functional.FEW_CLASSES + 8])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_few_logits_and_many_have_the_same_gradient(
    classes, weighted, reduction, generator, oracle
):
    logits = 5 * torch.randn(7, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (7,), generator=generator)
    target[2] = 1
    options = {"reduction": reduction, "ignore_index": 1, "alpha": 0.25}
    if weighted:
        options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    upstream = torch.randn((7,) if reduction == "none" else (), generator=generator).double()
    direct = gradient_of(logits, target, upstream=upstream, **options)
    with mock.patch.object(functional, "FEW_LOGITS", 0):
        tiled = gradient_of(logits, target, upstream=upstream, **options)
    assert direct[2].abs().max() == 0
    assert torch.allclose(direct, tiled, rtol=0, atol=2e-15)
    expected = oracle(logits, target, upstream=upstream, **options)
    assert torch.allclose(direct, expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_strided_logits_give_the_same_gradient(layout, generator, oracle):
    logits, target = draw((2, 5, 3, 3), generator)
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        logits = logits.transpose(2, 3)
    else:
        logits = logits[:, :, :1].expand(2, 5, 3, 3)
    with mock.patch.object(functional, "CPU_TILE", 11):
        gradient = gradient_of(logits, target, alpha=0.5)
    assert torch.allclose(gradient, oracle(logits, target, alpha=0.5), rtol=0, atol=1e-15)


def test_a_gradient_worked_by_hand():
    # p = 16/17, 1/17; their fourth roots are as 2 : 1, so p' = 2/3, 1/3; the value is log(17/16)
    logits = torch.tensor([[math.log(16), 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    assert gradient_of(logits, target, alpha=0.25).tolist()[0] == pytest.approx(
        [-1 / 3, 1 / 3], rel=1e-15
    )
    assert power_grad_cross_entropy(logits, target).item() == pytest.approx(
        math.log(17 / 16), rel=1e-15
    )
    # class weights 3 and 1, smoothing .5: d = (2.25, .25), |d| = 2.5; "sum" divides by nothing
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64)
    gradient = gradient_of(logits, target, weight=weight, label_smoothing=0.5, reduction="sum")
    assert gradient.tolist()[0] == pytest.approx([2.5 * 2 / 3 - 2.25, 2.5 / 3 - 0.25], rel=1e-14)


@pytest.mark.parametrize(("name", "soft"), CASES)
def test_alpha_one_is_torchs_own_loss(name, soft, generator):
    logits, target = draw((6, 5), generator, soft=soft)
    target = target if soft else target.clamp(0)
    logits.requires_grad_()
    ours = power_grad_cross_entropy(logits, target, alpha=1, **OPTIONS[name])
    theirs = F.cross_entropy(logits, target, **OPTIONS[name])
    assert ours.grad_fn.name() == theirs.grad_fn.name()
    assert torch.equal(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])


@pytest.mark.parametrize("exponent", [-20, -1, 3, 16])
def test_loss_scale_only_scales(exponent, generator):
    logits, target = draw((6, 5), generator)
    plain = gradient_of(logits, target)
    scaled = gradient_of(logits, target, upstream=torch.tensor(2.0**exponent, dtype=torch.float64))
    assert torch.equal(scaled, plain * 2.0**exponent)


def test_sum_is_the_mean_times_the_rows_that_count(generator):
    logits, target = draw((6, 5), generator)
    total = gradient_of(logits, target, reduction="sum")
    assert torch.allclose(total, gradient_of(logits, target) * 5, rtol=1e-15, atol=0)


def test_accumulated_micro_batches_are_the_whole_batch(generator):
    logits, _ = draw((32, 5), generator)
    target = torch.randint(5, (32,), generator=generator)
    micro = [gradient_of(z, t) / 4 for z, t in zip(logits.split(8), target.split(8), strict=True)]
    assert torch.allclose(torch.cat(micro), gradient_of(logits, target), rtol=1e-15, atol=0)


@pytest.mark.parametrize("gap", [60.0, 120.0, 1e4, 3e38])
def test_huge_logit_gaps_keep_the_gradient_exact(gap, reference):
    logits = torch.tensor([[gap, 0.0, -gap]])
    gradient = gradient_of(logits, torch.tensor([1]), alpha=0.25)
    expected = torch.tensor(
        reference.gradient([[min(gap, 1e4), 0.0, -min(gap, 1e4)]], [1], alpha=0.25)
    )
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-37)
    if gap == 120:
        assert torch.softmax(logits, 1)[0, 1] == 0
        assert gradient[0, 2] > 0


def test_masked_classes_get_no_gradient_and_no_nan(generator, oracle):
    logits, target = draw((6, 5), generator)
    target = target.clamp(0, 3)
    logits[:, 4] = -math.inf
    gradient = gradient_of(logits, target, alpha=0.25)
    assert gradient[:, 4].count_nonzero() == 0
    assert torch.allclose(gradient, oracle(logits, target, alpha=0.25), rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT}])
def test_a_batch_of_ignored_rows_has_torchs_nan_and_no_gradient(options, generator):
    logits, _ = draw((6, 5), generator)
    ignored = torch.full((6,), -100)
    assert power_grad_cross_entropy(logits, ignored, **options).isnan()
    assert power_grad_cross_entropy(logits, ignored, reduction="sum", **options) == 0
    assert gradient_of(logits, ignored, **options).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_an_empty_batch_is_torchs_and_has_an_empty_gradient(shape, generator):
    logits, target = draw(shape, generator)
    assert gradient_of(logits, target).shape == shape
    for reduction in ("none", "mean", "sum"):
        ours = power_grad_cross_entropy(logits, target, reduction=reduction)
        assert torch.equal(
            ours.nan_to_num(7), F.cross_entropy(logits, target, reduction=reduction).nan_to_num(7)
        )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_option_matches_the_oracle(data, oracle):
    batch, classes = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 7))
    rest = tuple(data.draw(st.lists(st.integers(1, 4), max_size=2)))
    soft = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.sampled_from([1e-3, 1.0, 30.0, 1e3]))
    logits = torch.randn((batch, classes, *rest), generator=generator, dtype=torch.float64) * size
    options = {
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "ignore_index": -100 if soft else data.draw(st.sampled_from([-100, -1, 0, classes])),
    }
    if data.draw(st.booleans()):
        options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
    if soft:
        target = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    else:
        target = torch.randint(classes, (batch, *rest), generator=generator)
        ignored = torch.rand(target.shape, generator=generator) < 0.3
        target = target.masked_fill(ignored, options["ignore_index"])
    alpha = data.draw(st.floats(0.01, 0.99))
    plain = F.cross_entropy(logits, target, **options)
    upstream = torch.ones_like(plain)
    with mock.patch.object(functional, "CPU_TILE", data.draw(st.integers(1, 200))):
        value = power_grad_cross_entropy(logits, target, alpha=alpha, **options)
        gradient = gradient_of(logits, target, alpha=alpha, upstream=upstream, **options)
    expected = oracle(logits, target, alpha=alpha, upstream=upstream, **options)
    assert gradient.isfinite().all()
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-13)
    assert torch.allclose(value, plain, rtol=1e-12, atol=1e-14, equal_nan=True)
