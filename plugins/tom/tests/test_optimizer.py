import math

import pytest
import regrad
import torch
from regrad.optimizers import decoupled_decay
from regrad_tom import Tom

ORACLE = {
    1: 0.11,
    2: 0.21,
    10: 0.71,
    50: 1.06,
    100: 1.04,
    200: 1.01,
    400: 1.00,
}  # t = 200: 1 + 11·.01·.99¹⁹⁹ = 1.0149


def make_model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)
        ).to(dtype)


def batches(count=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model, inputs, target):
    return torch.nn.functional.cross_entropy(model(inputs), target)


def train(model, optimizer, data=None, parts=1):
    for inputs, target in data or batches(dtype=model[0].weight.dtype):
        optimizer.zero_grad()
        for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
            (loss_of(model, x, y) / parts).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(first, second, tolerance=0.0):
    return all((a - b).abs().max() <= tolerance for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("gradient", [3.0, -0.01])
def test_steps_on_a_constant_gradient_are_the_known_multiples_of_the_rate(foreach, gradient):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Tom([weight], lr=0.1, foreach=foreach)
    seen = {}
    for t in range(1, 401):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        seen[t] = ((before - weight.detach())[0] / 0.1).item() * math.copysign(1, gradient)
    assert {t: round(seen[t], 2) for t in ORACLE} == ORACLE


def test_with_the_bias_corrected_the_first_step_is_nearly_the_rate():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.full_like(weight, 5.0)
    Tom([weight], lr=0.1, correct_bias=True).step()
    # (m + r)/c = (.1 + .01)/(1 − .9·.99) = .11/.109
    assert weight.item() == pytest.approx(-0.1 * 0.11 / 0.109, rel=1e-8)


def test_no_memory_and_no_trend_is_the_sign_of_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Tom([weight], lr=0.1, betas=(0.0, 0.0, 0.0), eps=1e-300)
    weight.grad = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    optimizer.step()
    # m = g and r = g − 0: twice the sign
    torch.testing.assert_close(
        weight.detach(), torch.tensor([-0.2, 0.2, -0.2], dtype=torch.float64)
    )


def test_no_trend_and_the_trends_rate_zero_is_adam():
    """With β₂ → 1 the trend stays 0; what remains is Adam without its first bias correction."""
    ours, theirs = make_model(), make_model()
    optimizer = Tom(ours.parameters(), lr=0.01, betas=(0.9, 1 - 1e-16, 0.999))
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for step, data in enumerate(batches(), start=1):
        adam.param_groups[0]["lr"] = 0.01 * (1 - 0.9**step)
        got, want = train(ours, optimizer, [data]), train(theirs, adam, [data])
        assert same(got, want, 1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"correct_bias": True}], ids=str
)
def test_foreach_gives_the_numbers_of_the_loop(options):
    results = []
    for foreach in (True, False):
        model = make_model()
        results.append(train(model, Tom(model.parameters(), lr=0.01, foreach=foreach, **options)))
    assert same(*results, 1e-14)


def test_decay_is_decoupled():
    weight = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = Tom([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.05), abs=1e-15)
    assert not optimizer.state[weight]["trend"].any()


def test_decay_added_to_the_gradient_is_the_authors_coupled_decay():
    """Their file, one number: λθ is part of g, so it enters the trend and the second moment."""
    decay, rate, one, two, three = 0.3, 0.1, 0.9, 0.99, 0.999
    weight = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = Tom([weight], lr=rate)
    theirs, level, trend, square, last = 2.0, 0.0, 0.0, 0.0, 0.0
    for step in range(1, 21):
        gradient = math.cos(step)
        coupled = gradient + decay * theirs
        level = one * (level + trend) + (1 - one) * coupled
        trend = two * trend + (1 - two) * (coupled - last)
        square = three * square + (1 - three) * coupled**2
        last = coupled
        theirs -= rate * (level + trend) / (math.sqrt(square / (1 - three**step)) + 1e-8)
        weight.grad = gradient + decay * weight.detach()
        optimizer.step()
    assert weight.item() == pytest.approx(theirs, rel=1e-12)
    assert optimizer.state[weight]["trend"].item() == pytest.approx(trend, rel=1e-12)


def test_schedulers_groups_and_named_parameters_work():
    model = make_model()
    groups = [
        {"params": model[0].named_parameters()},
        {"params": model[2].named_parameters(), "lr": 0.0},
    ]
    optimizer = Tom(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [0.1, 1e-30], total_steps=8, cycle_momentum=False
    )
    before = model[2].weight.detach().clone()
    for data in batches(7):
        train(model, optimizer, [data])
        scheduler.step()
    assert torch.allclose(model[2].weight, before, rtol=0, atol=1e-20)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("foreach", [True, False])
def test_a_bf16_model_keeps_state_in_bf16_and_follows_the_reference(foreach, reference):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer, plain = Tom([weight], lr=0.1, betas=(0.5, 0.5, 0.5), foreach=foreach), None
    plain, values = reference.Tom(rate=0.1, betas=(0.5, 0.5, 0.5)), [1.0] * 3
    for index in range(6):
        gradient = [1.0, -2.0, 0.5 * index]
        weight.grad = torch.tensor(gradient, dtype=torch.bfloat16)
        optimizer.step()
        values = plain.step(values, gradient)
    state = optimizer.state[weight]
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32,
        **dict.fromkeys(("forecast", "trend", "square", "last_gradient"), torch.bfloat16),
    }
    # bf16 keeps 8 bits; six steps of a tenth
    torch.testing.assert_close(
        weight.detach().double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=0.03
    )


def test_a_non_finite_gradient_stays_in_its_own_elements():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Tom([weight], lr=0.1)
    weight.grad = torch.tensor([torch.nan, 1.0])
    optimizer.step()
    assert weight[0].isnan()
    assert weight[1].isfinite()


def test_a_correction_of_regrad_acts_on_it():
    assert regrad.load("tom", "regrad.optimizers") is Tom
    model = make_model()
    with regrad.attach(model, Tom(model.parameters(), lr=0.01), []) as attachment:
        train(model, attachment.optimizer)
        assert attachment.metrics()["steps_applied"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0 and finite, got -1\.0"),
        ({"lr": math.nan}, "lr must be at least 0 and finite, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got shape \[2\]"),
        ({"betas": (0.9, 0.99)}, r"betas must be three numbers in \[0, 1\), got \(0\.9, 0\.99\)"),
        (
            {"betas": (0.9, 1.0, 0.9)},
            r"betas must be three numbers in \[0, 1\), got \(0\.9, 1\.0, 0\.9\)",
        ),
        ({"eps": 0.0}, r"eps must be positive and finite, got 0\.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0 and finite, got -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        Tom([weight], **options)
    optimizer = Tom([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.complex64, r"parameters must be real and floating point, got torch\.complex64"),
        (
            torch.float16,
            r"eps must not vanish in torch\.float16, got 1e-08; keep the weights in float32",
        ),
    ],
)
def test_parameters_without_a_rule_are_refused(dtype, message):
    weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        Tom([weight])
    optimizer = Tom([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_moves():
    table, dense = torch.nn.Embedding(4, 2, sparse=True), torch.nn.Linear(2, 1)
    optimizer = Tom([*dense.parameters(), *table.parameters()])
    before = dense.weight.detach().clone()
    dense(table(torch.tensor([1]))).sum().backward()
    with pytest.raises(
        RuntimeError, match="gradients must be dense, got a sparse one; use sparse=False"
    ):
        optimizer.step()
    assert torch.equal(dense.weight, before)


def test_a_group_says_that_its_decay_is_decoupled_also_after_an_older_checkpoint():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Tom([weight], lr=0.1, weight_decay=0.1)
    assert decoupled_decay(optimizer, optimizer.param_groups[0]) == 0.1
    older = optimizer.state_dict()
    del older["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(older)
    assert decoupled_decay(optimizer, optimizer.param_groups[0]) == 0.1
    weight.grad = torch.ones(2)
    optimizer.step()
