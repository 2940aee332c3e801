"""Groups, options and refusals."""

import math

import pytest
import regrad
import torch
from regrad_bop import Bop, Bop2, binarise_

KINDS = [Bop, Bop2]


def sign_weight(*values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values or (1.0, -1.0), dtype=dtype))


def real_weight():
    return torch.nn.Parameter(torch.tensor([0.5, -0.2], dtype=torch.float64))


def test_both_are_found_by_their_names():
    assert regrad.load("bop", "regrad.optimizers") is Bop
    assert regrad.load("bop2", "regrad.optimizers") is Bop2


@pytest.mark.parametrize("kind", KINDS)
def test_real_groups_are_updated_as_by_adamw_bit_for_bit(kind):
    binary, ours, theirs = sign_weight(), real_weight(), real_weight()
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    groups = [{"params": [binary], "binary": True}, {"params": [ours]}]
    optimizer = kind(groups, lr=1e-3, real_lr=0.03, **options)
    adamw = torch.optim.AdamW([theirs], lr=0.03, **options)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.03]
    for step in range(5):
        binary.grad = torch.zeros_like(binary)
        for weight in (ours, theirs):
            weight.grad = torch.tensor([1.0, -0.1 * step], dtype=torch.float64)
        optimizer.step()
        adamw.step()
        assert torch.equal(ours, theirs)
    assert binary.tolist() == [1.0, -1.0]


def test_a_real_group_may_have_a_rate_of_its_own_and_schedulers_move_both_kinds():
    groups = [
        {"params": [sign_weight()], "binary": True},
        {"params": [real_weight()]},
        {"params": [real_weight()], "lr": 0.5},
    ]
    optimizer = Bop(groups, lr=0.1, real_lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.25]


def test_a_group_has_thresholds_of_its_own_and_a_dict_given_is_not_written_to():
    first, second = sign_weight(), sign_weight()
    given = {"params": [second], "binary": True, "threshold": 1.0}
    optimizer = Bop([{"params": [first], "binary": True}, given], lr=0.1, threshold=0.0)
    for weight in (first, second):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert first.tolist() == [-1.0, -1.0]
    assert second.tolist() == [1.0, -1.0]
    assert set(given) == {"params", "binary", "threshold"}


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_than_signs_are_refused_by_name_before_anything_moves(kind):
    layer = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(0.25)
    good = sign_weight()
    groups = [
        {"params": [("good", good)], "binary": True},
        {"params": list(layer.named_parameters()), "binary": True},
    ]
    optimizer = kind(groups, lr=0.5, threshold=0.0)
    good.grad = torch.ones_like(good)
    layer.weight.grad = torch.ones_like(layer.weight)
    message = (
        "parameter 'weight' must hold -1 and \\+1 alone in a group with binary=True, got 0.25; "
        "call regrad_bop.binarise_ on it, or leave binary out"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert good.tolist() == [1.0, -1.0]
    binarise_(layer)
    optimizer.step()
    assert good.tolist() == [-1.0, -1.0]


def test_a_weight_without_a_name_is_refused_by_its_place():
    weights = [sign_weight(), sign_weight(1.0, math.nan)]
    optimizer = Bop([{"params": weights, "binary": True}])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 must hold -1 and .*, got nan"):
        optimizer.step()


def test_bop2_gathers_evidence_in_its_warm_up_and_flips_after_it():
    weight = sign_weight(1.0, 1.0)
    groups = [{"params": [weight], "binary": True}]
    optimizer = Bop2(groups, lr=0.5, threshold=0.0, second_rate=0.5, warmup_steps=2)
    seen = []
    for gradient in (4.0, -1.0, 0.5):
        weight.grad = torch.tensor([gradient, -gradient], dtype=torch.float64)
        optimizer.step()
        seen.append(weight.tolist())
    # m after three steps: ±(.5·(.5·(.5·4) − .5·1) + ... ) = ±.5: against the first weight
    assert seen == [[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]
    assert optimizer.state[weight]["moment"].tolist() == [0.5, -0.5]


def test_the_unbiased_bop2_is_the_references_at_a_constant_rate(reference):
    weight = sign_weight(1.0, -1.0, 1.0, -1.0, 1.0)
    options = {"threshold": 0.5, "second_rate": 0.01, "unbiased": True}
    optimizer = Bop2([{"params": [weight], "binary": True}], lr=0.1, **options)
    plain = reference.Bop2(rate=0.1, **options)
    values = weight.tolist()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        weight.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        values = plain.step(values, weight.grad.tolist())
        optimizer.step()
        assert weight.tolist() == values


def test_the_bias_is_the_weight_of_the_gradients_whatever_the_rates_were():
    """With a constant gradient m/c is the gradient; 1 - (1-γ)ᵗ with the last γ is not its weight.

    There the ratio would be 1e3, not 1, after the rate fell to a thousandth: every flip is allowed.
    """
    weight = sign_weight(-1.0, -1.0)
    groups = [{"params": [weight], "binary": True}]
    optimizer = Bop2(groups, lr=0.1, threshold=9.0, second_rate=0.01, unbiased=True)
    for rate in (0.1, 0.05, 1e-4):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    state = optimizer.state[weight]
    total = -math.expm1(state["log_left"])
    assert total == pytest.approx(1 - 0.9 * 0.95 * (1 - 1e-4), rel=1e-12)
    torch.testing.assert_close((state["moment"] / total).tolist(), [2.0, 2.0])
    assert state["moment"][0].item() / (1 - (1 - 1e-4) ** 3) > 900


def test_a_rate_of_one_has_no_memory():
    weight = sign_weight(1.0, 1.0)
    options = {"threshold": 0.5, "second_rate": 1.0, "unbiased": True}
    optimizer = Bop2([{"params": [weight], "binary": True}], lr=1.0, **options)
    for gradient in ([-5.0, 1.0], [1.0, 1.0]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_with_signs_says_that_its_weights_are_discrete(kind):
    """A weight halfway between two signs means nothing: regrad moves none."""
    optimizer = kind([real_weight()])
    assert not optimizer.discrete_weights
    optimizer.add_param_group({"params": [sign_weight()], "binary": True})
    assert optimizer.discrete_weights


RANGES = [
    (KINDS, {"lr": -1.0}, r"lr must be in \[0, 1\] for binary weights, .*, got -1\.0"),
    (KINDS, {"lr": 1.5}, r"lr must be in \[0, 1\] for binary weights, .*, got 1\.5"),
    (KINDS, {"lr": math.nan}, r"lr must be in \[0, 1\] .*, got nan"),
    (KINDS, {"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, .* \[2\]"),
    (KINDS, {"real_lr": -0.1}, r"real_lr must be at least 0 and finite, got -0\.1"),
    (KINDS, {"threshold": -1e-9}, "threshold must be at least 0 and finite, got -1e-09"),
    (KINDS, {"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
    (KINDS, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got"),
    (KINDS, {"eps": 0.0}, r"eps must be positive and finite, got 0\.0"),
    (KINDS, {"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
    ([Bop2], {"second_rate": 0.0}, r"second_rate must be in \(0, 1\], got 0\.0"),
    ([Bop2], {"warmup_steps": -1}, "warmup_steps must be at least 0 and finite, got -1"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(kind, options, message) for kinds, options, message in RANGES for kind in kinds],
)
def test_options_out_of_range_are_refused(kind, options, message):
    group = {"params": [sign_weight()], "binary": True}
    with pytest.raises(ValueError, match=message):
        kind([group], **options)
    optimizer = kind([real_weight()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({**group, **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_above_one_is_fine_for_a_real_group(kind):
    optimizer = kind([{"params": [real_weight()], "lr": 3.0}])
    assert optimizer.param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize("binary", [True, False])
def test_complex_parameters_are_refused(binary):
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameters must be real and floating point, got"):
        Bop([{"params": [weight], "binary": binary}])


def test_float16_is_fine_for_signs_and_refused_for_real_weights():
    weight = sign_weight(dtype=torch.float16)
    optimizer = Bop([{"params": [weight], "binary": True}], threshold=0.0)
    weight.grad = torch.full_like(weight, 1e-6)
    optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match=r"eps must not vanish in torch\.float16, got 1e-08"):
        Bop([weight])


def test_a_sparse_gradient_is_refused_before_anything_moves():
    table = torch.nn.Embedding(4, 2, sparse=True)
    binarise_(table)
    weight = sign_weight(dtype=torch.float32)
    groups = [{"params": [weight, *table.parameters()], "binary": True}]
    optimizer = Bop(groups, lr=1.0, threshold=0.0)
    weight.grad = torch.ones_like(weight)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="gradients must be dense, got a sparse one"):
        optimizer.step()
    assert weight.tolist() == [1.0, -1.0]
