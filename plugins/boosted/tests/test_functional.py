"""The functions against the paper's loops, against numbers worked out by hand, and on bad input."""

import re

import pytest
import torch
from regrad_boosted.functional import (
    boosted_cross_entropy,
    boosted_logits,
    exit_loss,
    running_sum,
    weighted_sum,
)
from torch.nn import functional as F

# Losses of the worked example in conftest.py, from the specification, by decay: sum and exits.
LOSSES = {
    0.0: (3.501830952874, (0.646772641056, 1.200837474656, 1.654220837162)),
    0.5: (3.036446671778, (0.646772641056, 0.893103203443, 1.496570827278)),
    1.0: (2.385580058266, (0.646772641056, 0.674254617172, 1.064552800037)),
}
# Their gradients for a decay of .5.
SLOPES = (
    (
        (0.168792268899, 0.125044388311, -0.29383665721),
        (-0.167379522113, 0.122364235527, 0.045015286585),
    ),
    (
        (0.109546732654, 0.209841239084, -0.319387971738),
        (-0.268018286018, 0.140704022023, 0.127314263995),
    ),
    (
        (0.219142740773, 0.166454716898, -0.385597457672),
        (-0.390453267346, 0.209841239084, 0.180612028262),
    ),
)
PRINTED = 1e-11  # half of the last digit that the specification prints, and a little


def slopes_of(loss, outputs):
    return torch.autograd.grad(loss, outputs, allow_unused=True)


def rows_of(outputs):
    return [output.tolist() for output in outputs]


@pytest.mark.parametrize("decay", LOSSES)
def test_the_losses_are_those_of_the_worked_example(decay, outputs, target):
    total, by_exit = LOSSES[decay]
    losses = [exit_loss(logits, target) for logits in boosted_logits(outputs, decay=decay)]
    assert [loss.item() for loss in losses] == pytest.approx(by_exit, abs=PRINTED)
    loss = boosted_cross_entropy(outputs, target, decay=decay)
    assert loss.item() == pytest.approx(total, abs=PRINTED)


def test_the_gradients_are_those_of_the_worked_example(outputs, target):
    found = slopes_of(boosted_cross_entropy(outputs, target), outputs)
    for slope, rows in zip(found, SLOPES, strict=True):
        wanted = torch.tensor(rows, dtype=torch.float64)
        assert torch.allclose(slope, wanted, rtol=0, atol=PRINTED)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("exit_weights", [None, (0.5, 1.0, 2.0)])
def test_losses_and_gradients_are_those_of_the_loops(
    decay, alpha, exit_weights, outputs, target, reference
):
    loss = boosted_cross_entropy(
        outputs, target, decay=decay, alpha=alpha, exit_weights=exit_weights
    )
    by_exit = reference.losses(rows_of(outputs), target.tolist(), decay=decay)
    weights = exit_weights or (1.0, 1.0, 1.0)
    wanted_loss = sum(weight * each for weight, each in zip(weights, by_exit, strict=True))
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-14)
    wanted = reference.gradients(
        rows_of(outputs), target.tolist(), decay=decay, alpha=alpha, exit_weights=exit_weights
    )
    for slope, rows in zip(slopes_of(loss, outputs), wanted, strict=True):
        assert torch.allclose(slope, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_gradient_of_the_first_exit_is_the_same_for_every_decay(outputs, target):
    first = [
        slopes_of(boosted_cross_entropy(outputs, target, decay=decay), outputs)[0]
        for decay in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


def test_no_gradient_flows_into_what_earlier_exits_said(outputs, target):
    last = exit_loss(boosted_logits(outputs, decay=0.5)[2], target)
    slopes = slopes_of(last, outputs)
    assert slopes[0] is None
    assert slopes[1] is None
    assert slopes[2].abs().sum() > 0


def test_predictions_are_the_sums_worked_out_by_hand(outputs):
    # first row of the third exit: (.7, .1, -.2) + .5 ((-.3, .5, .1) + .5 (.2, -.1, .4))
    last = running_sum(outputs)[2]
    assert last[0].tolist() == pytest.approx([0.6, 0.325, -0.05], abs=1e-15)


def test_predictions_are_what_the_losses_saw(outputs):
    sums = running_sum(outputs, decay=0.3)
    seen = boosted_logits(outputs, decay=0.3)
    assert all(torch.equal(one, other) for one, other in zip(sums, seen, strict=True))


def test_published_rates_differ_between_training_and_evaluation_unless_all_are_equal(outputs):
    # The published code adds r_{n-1} F_{n-1} in training and r_n F_{n-1} in evaluation, as the
    # specification says; with rates (.5, .25, 1) the third exit's first row is another one.
    rates = (0.5, 0.25, 1.0)
    first, second, third = (output[0].detach() for output in outputs)
    in_training = third + rates[1] * (second + rates[0] * first)
    in_evaluation = third + rates[2] * (second + rates[1] * first)
    assert in_training.tolist() == pytest.approx([0.65, 0.2125, -0.125], abs=1e-15)
    assert in_evaluation.tolist() == pytest.approx([0.45, 0.575, 0.0], abs=1e-15)


def test_without_decay_it_is_the_plain_sum_bit_for_bit(outputs, target):
    plain = sum(F.cross_entropy(output, target) for output in outputs)
    loss = boosted_cross_entropy(outputs, target, decay=0.0)
    assert torch.equal(loss, plain)
    for one, other in zip(slopes_of(loss, outputs), slopes_of(plain, outputs), strict=True):
        assert torch.equal(one, other)


def test_without_decay_infinite_logits_of_one_exit_leave_the_next_alone(target):
    mad = torch.full((2, 3), -torch.inf)
    assert running_sum([mad, torch.zeros(2, 3)], decay=0.0)[1].isfinite().all()


def test_one_exit_is_plain_cross_entropy(outputs, target):
    loss = boosted_cross_entropy(outputs[:1], target)
    assert torch.equal(loss, F.cross_entropy(outputs[0], target))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_every_setting_of_cross_entropy_is_torchs(reduction, soft, generator):
    outputs = [torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    target = torch.randint(3, (4, 5), generator=generator)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    settings = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight}
    if soft:
        target = torch.softmax(outputs[0], 1)
    else:
        settings["ignore_index"] = int(target[0, 0])
    sums = running_sum(outputs)
    wanted = sum(F.cross_entropy(each, target, **settings) for each in sums)
    found = boosted_cross_entropy(outputs, target, **settings)
    assert torch.allclose(found, wanted, rtol=1e-15)


def test_a_flattened_softmax_keeps_the_value(outputs, target):
    values = [boosted_cross_entropy(outputs, target, alpha=alpha).item() for alpha in (1.0, 0.25)]
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_added_up_in_float32(dtype, outputs, target):
    halves = [output.detach().to(dtype).requires_grad_() for output in outputs]
    wide = [half.detach().float().requires_grad_() for half in halves]
    loss = boosted_cross_entropy(halves, target)
    expected = boosted_cross_entropy(wide, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    found = torch.autograd.grad(loss, halves)
    for half, slope in zip(found, torch.autograd.grad(expected, wide), strict=True):
        assert torch.equal(half, slope.to(dtype))


def test_a_compiled_loss_is_one_graph_with_the_same_numbers(outputs, target):
    torch.compiler.reset()
    compiled = torch.compile(boosted_cross_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(outputs, target), boosted_cross_entropy(outputs, target))


REFUSALS = {
    "a tensor": (
        {"outputs": torch.zeros(2, 3)},
        TypeError,
        "outputs must be a tuple or list of logits, one tensor per exit, got Tensor",
    ),
    "none": ({"outputs": []}, ValueError, "outputs must hold the logits of at least one exit"),
    "not tensors": (
        {"outputs": [torch.zeros(2, 3), None]},
        TypeError,
        "outputs must hold tensors, got NoneType among them",
    ),
    "shapes": (
        {"outputs": [torch.zeros(2, 3), torch.zeros(2, 4)]},
        ValueError,
        "outputs must all be of one shape, got [[2, 3], [2, 4]]",
    ),
    "decay": ({"decay": 1.5}, ValueError, "decay must be in [0, 1], got 1.5; 0 is the plain sum"),
    "alpha": ({"alpha": 0}, ValueError, "alpha must be in (0, 1], got 0; 1 is plain"),
    "weights": (
        {"exit_weights": (1.0, -1.0, 1.0)},
        ValueError,
        "exit_weights must be positive and finite, got (1.0, -1.0, 1.0)",
    ),
    "few weights": (
        {"exit_weights": (1.0, 2.0)},
        ValueError,
        "exit_weights must hold one number per exit, got (1.0, 2.0) for 3 exits",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unfit_arguments_are_refused_in_words(case, outputs, target):
    options, error, message = REFUSALS[case]
    arguments = {"outputs": outputs, "target": target, **options}
    with pytest.raises(error, match=re.escape(message)):
        boosted_cross_entropy(**arguments)


def test_a_weighted_sum_of_vectors_is_a_vector():
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    assert weighted_sum(losses, (2.0, 1.0)).tolist() == [5.0, 9.0]
    assert weighted_sum(losses).tolist() == [4.0, 7.0]
