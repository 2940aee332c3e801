import math

import pytest
import regrad
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad_adanorm import AdaNorm
from regrad_testing import no_waiting

STEPS, SHAPE = 40, (2, 3)


def scale_of(index):
    """Steps with norms that rise, fall, and vanish once, so that the rule fires and rests."""
    return 0.0 if index == 30 else [1.0, 2.0, 0.7, 0.05, 1.3][index % 5] if index > 8 else 1.0


def gradient_at(weight, index):
    generator = torch.Generator().manual_seed(index)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return scale_of(index) * (noise + 0.3 * weight)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


class Model(torch.nn.Module):
    """One weight whose gradient is whatever `gradient_at` says."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(start().to(dtype))

    def forward(self, index, gradient=None):
        given = gradient_at(self.weight.detach(), index) if gradient is None else gradient
        return (self.weight * given.to(self.weight.dtype)).sum()


def run(model, optimizer, steps=range(STEPS), corrections=("adanorm",)):
    weights = []
    with regrad.attach(model, optimizer, list(corrections)):
        for index in steps:
            optimizer.zero_grad()
            model(index).backward()
            optimizer.step()
            weights.append(model.weight.detach().clone())
    return weights


def case(kind, theirs, **options):
    own = {
        k: v
        for k, v in options.items()
        if k not in ("fused", "foreach", "weight_decay", "decoupled_weight_decay")
    }
    decoupled = options.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    own |= {
        "decay": options.get("weight_decay", 0.01 if kind is torch.optim.AdamW else 0.0),
        "decoupled": decoupled,
    }
    name = " ".join([kind.__name__, *(f"{key}={value}" for key, value in options.items())])
    return pytest.param(
        lambda p: kind(p, lr=0.1, **options),
        lambda r, rule: getattr(r, theirs)(rule=rule, **own),
        id=name,
    )


def sgd(**options):
    return case(torch.optim.SGD, "SGD", momentum=0.9, **options)


O = torch.optim  # noqa: E741
OPTIMIZERS = [
    *(
        sgd(**o)
        for o in (
            {},
            {"dampening": 0.3},
            {"weight_decay": 0.1},
            {"maximize": True},
            {"nesterov": True},
        )
    ),
    *(
        sgd(**o)
        for o in (
            {"fused": True},
            {"foreach": True},
            {"weight_decay": 0.1, "maximize": True, "foreach": True},
        )
    ),
    sgd(dampening=0.2, weight_decay=0.1, maximize=True),
    sgd(nesterov=True, weight_decay=0.1),
    sgd(dampening=1.0),
]
for kind, theirs in [
    (O.Adam, "Adam"),
    (O.AdamW, "Adam"),
    (O.NAdam, "NAdam"),
    (O.RAdam, "RAdam"),
    (O.Adamax, "Adamax"),
]:
    for o in (
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"foreach": True, "weight_decay": 0.1},
        {"betas": (0.5, 0.9)},
    ):
        OPTIMIZERS.append(case(kind, theirs, **o))
OPTIMIZERS += [
    case(O.Adam, "Adam", fused=True),
    case(O.Adam, "Adam", fused=True, weight_decay=0.1, maximize=True),
    case(O.AdamW, "Adam", fused=True),
    case(O.Adam, "Adam", amsgrad=True, weight_decay=0.1),
    case(O.Adam, "Adam", decoupled_weight_decay=True, weight_decay=0.1),
    case(O.NAdam, "NAdam", decoupled_weight_decay=True, weight_decay=0.1),
    case(O.RAdam, "RAdam", decoupled_weight_decay=True, weight_decay=0.1),
]


@pytest.mark.parametrize(("make", "plain"), OPTIMIZERS)
def test_training_is_that_of_the_optimizer_with_the_rule_inside(make, plain, reference):
    model = Model()
    weights = run(model, make(model.parameters()))
    expected = reference.train(start(), gradient_at, plain(reference, reference.Rule()), STEPS)
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    without = reference.train(start(), gradient_at, plain(reference, None), STEPS)
    if (
        getattr(plain(reference, None), "dampening", 0.0) != 1.0
    ):  # then the buffer takes no gradient any more
        assert (without[-1] - expected[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("make", "plain"), OPTIMIZERS)
def test_the_second_moment_is_that_of_the_raw_gradient_and_grad_is_left_alone(
    make, plain, reference
):
    model = Model()
    optimizer = make(model.parameters())
    with regrad.attach(model, optimizer, ["adanorm"]):
        for index in range(20):
            optimizer.zero_grad()
            model(index).backward()
            before = model.weight.grad.clone()
            optimizer.step()
            assert torch.equal(model.weight.grad, before)


def test_the_moment_is_the_one_worked_out_by_hand():
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.5, 0.9))
    direction = torch.zeros(SHAPE, dtype=torch.float64)
    direction[0, 0] = 1.0
    with regrad.attach(model, optimizer, ["adanorm:decay=0.5"]):
        for size in (4.0, 1.0):
            optimizer.zero_grad()
            model(0, size * direction).backward()
            optimizer.step()
    state = optimizer.state[model.weight]
    # e: 2, then 1.5 > 1, so s = 1.5; m: .5·4 = 2, then .5·2 + .5·1.5 = 1.75; v: .1·16 = 1.6, then .9·1.6 + .1·1 = 1.54
    assert state["exp_avg"][0, 0].item() == pytest.approx(1.75, abs=1e-15)
    assert state["exp_avg_sq"][0, 0].item() == pytest.approx(1.54, abs=1e-15)


def authors_adamnorm(weight, small, steps, eps=1e-8):
    """Return the weights after each step of the authors' AdamNorm, as their file computes them."""
    weights, first, second, average = [], 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        g = small * gradient_at(weight, step)
        average = 0.95 * average + 0.05 * g.norm()
        s = g * average / g.norm() if average > g.norm() else g
        first = 0.9 * first + 0.1 * s
        second = 0.999 * second + 0.001 * g * g + eps
        root = second.sqrt() / math.sqrt(1 - 0.999**step)
        weight = weight - 0.01 / (1 - 0.9**step) * first / (root + eps)
        weights.append(weight)
    return weights


def test_the_authors_adamnorm_has_epsilon_over_one_minus_beta_under_the_root(reference):
    class Theirs(reference.Adam):
        def unbiased_root(self):
            return torch.sqrt(self.second / (1 - self.betas[1] ** self.steps) + self.eps / 0.001)

        def direction(self, g, s):
            self.update_moments(g, s)
            return self.unbiased_first() / (self.unbiased_root() + self.eps)

    small = 1e-3  # gradients below √(1e-8/.001) = 3e-3
    steps = range(1, 25)
    theirs = authors_adamnorm(start(), small, len(steps))
    rule = Theirs(rule=reference.Rule(), rate=0.01)
    weight = start()
    for index, expected in zip(steps, theirs, strict=True):
        weight = rule.step(weight, small * gradient_at(weight, index))
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("eps", "apart"), [(1e-20, False), (1e-8, True)])
def test_without_that_epsilon_ours_is_the_authors_adamnorm(eps, apart):
    small, steps = 1e-3, range(1, 25)
    theirs = authors_adamnorm(start(), small, len(steps), eps=eps)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=eps)
    with regrad.attach(model, optimizer, ["adanorm"]):
        for index in steps:
            optimizer.zero_grad()
            model(index, small * gradient_at(model.weight.detach(), index)).backward()
            optimizer.step()
    difference = (model.weight.detach() - theirs[-1]).abs().max()
    assert difference > 0.05 if apart else difference < 1e-9


@pytest.mark.parametrize("target", ["moment", "gradient"])
def test_no_memory_changes_no_bit(target):
    plain, corrected = Model(), Model()
    expected = run(
        plain, torch.optim.Adam(plain.parameters(), lr=0.1, weight_decay=0.1), corrections=()
    )
    made = AdaNorm(decay=0.0, target=target)
    got = run(
        corrected,
        torch.optim.Adam(corrected.parameters(), lr=0.1, weight_decay=0.1),
        corrections=[made],
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert made.idle_reason() == "decay is 0: the average is the norm itself"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adadelta, torch.optim.RMSprop])
def test_the_gradient_as_target_is_the_rule_on_grad_for_any_optimizer(kind, reference):
    plain, corrected = Model(), Model()
    weights = run(
        corrected, kind(corrected.parameters(), lr=0.1), corrections=["adanorm:target=gradient"]
    )
    optimizer, rule = kind(plain.parameters(), lr=0.1), reference.Rule()
    for index, want in enumerate(weights):
        plain.weight.grad = rule(gradient_at(plain.weight.detach(), index))
        optimizer.step()
        torch.testing.assert_close(plain.weight.detach(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["moment", "gradient"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_zero_gradient_gives_no_nan_in_any_dtype(dtype, target, decay):
    model = Model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=decay)
    with regrad.attach(model, optimizer, [AdaNorm(target=target)]):
        for index in range(30):
            optimizer.zero_grad()
            size = 0.0 if index % 3 == 0 else 1e-6 if index % 3 == 1 else 1e4
            model(index, torch.full(SHAPE, size)).backward()
            optimizer.step()
            assert torch.isfinite(model.weight).all()
            assert torch.isfinite(optimizer.state[model.weight]["momentum_buffer"]).all()


def test_a_bf16_model_follows_the_reference_to_its_precision(reference):
    model = Model(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    rule, buffer = reference.Rule(), None
    correction = AdaNorm()
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for index in range(STEPS):
            optimizer.zero_grad()
            model(index).backward()
            s = rule(model.weight.grad.double())
            buffer = s if buffer is None else 0.5 * buffer + s
            optimizer.step()
        seen = optimizer.state[model.weight]["momentum_buffer"].double()
        # bf16 keeps 8 bits, and the sum of a few such roundings is halved at each step
        assert (seen - buffer).abs().max() < 0.03 * buffer.abs().max() + 0.01
        (average,) = attachment.state_dict()["corrections"]["adanorm"]["averages"].values()
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(rule.average, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_gradient_leaves_the_average_as_it_was(bad):
    model, correction = Model(), AdaNorm()
    optimizer = torch.optim.Adam(model.parameters())
    with regrad.attach(model, optimizer, [correction]):
        for index in range(3):
            optimizer.zero_grad()
            model(index).backward()
            optimizer.step()
        before = correction.state_dict()["averages"]["weight"]
        optimizer.zero_grad()
        model(0, torch.full(SHAPE, bad)).backward()
        optimizer.step()
        assert torch.equal(correction.state_dict()["averages"]["weight"], before)


def test_parameters_without_gradient_frozen_or_added_later_are_no_obstacle():
    used, idle, frozen, late = (torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen.requires_grad_(requires_grad=False)
    model = torch.nn.Module()
    model.used, model.idle, model.frozen, model.late = used, idle, frozen, late
    model.forward = lambda scale: (scale * used + (late if scale < 1 else 0)).sum()
    optimizer, correction = torch.optim.Adam([used, idle, frozen], lr=0.1), AdaNorm(decay=0.5)
    with regrad.attach(model, optimizer, [correction]):
        for scale in (2.0, 1.0, 0.5, 0.25):
            if scale == 0.5:
                optimizer.add_param_group({"params": [late], "weight_decay": 0.1})
            optimizer.zero_grad(set_to_none=True)
            model(scale).backward()
            optimizer.step()
        assert correction.state_dict()["averages"].keys() == {"used", "late"}
    assert idle not in optimizer.state


def test_one_new_parameter_in_a_group_does_not_keep_the_others_waiting(reference):
    model, other = Model(), torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    model.other = other
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rules, plain = reference.Rule(), None
    plain = reference.SGD(rule=rules)
    weight = start()
    with regrad.attach(model, optimizer, ["adanorm"]):
        for index in range(STEPS):
            optimizer.zero_grad()
            (model(index) + (other.sum() if index >= 19 else 0)).backward()
            optimizer.step()
            weight = plain.step(weight, gradient_at(weight, index))
            torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-13)


def test_after_a_restored_average_it_waits_for_the_moment():
    model, correction = Model(), AdaNorm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    correction.load_state_dict({"averages": {"weight": torch.tensor(100.0)}})
    one = torch.zeros(SHAPE, dtype=torch.float64)
    one[0, 0] = 1.0
    with regrad.attach(model, optimizer, [correction]):
        for _ in range(2):
            optimizer.zero_grad()
            model(0, one).backward()
            optimizer.step()
            if "momentum_buffer" in optimizer.state[model.weight] and _ == 0:
                assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], one)
    # e: 95.05, then 90.3475: s = 90.3475, buffer = .9 + 90.3475
    assert optimizer.state[model.weight]["momentum_buffer"][0, 0].item() == pytest.approx(
        91.2475, rel=1e-14
    )


@pytest.mark.parametrize("target", ["moment", "gradient"])
def test_state_survives_a_checkpoint_bit_for_bit(target, tmp_path):
    through = Model()
    expected = run(
        through, torch.optim.RAdam(through.parameters()), corrections=[AdaNorm(target=target)]
    )
    model = Model()
    optimizer = torch.optim.RAdam(model.parameters())
    with regrad.attach(model, optimizer, [AdaNorm(target=target)]) as attachment:
        for index in range(17):
            optimizer.zero_grad()
            model(index).backward()
            optimizer.step()
        parts = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "regrad": attachment.state_dict(),
        }
        torch.save(parts, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)
    fresh = Model()
    optimizer = torch.optim.RAdam(fresh.parameters())
    fresh.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with regrad.attach(fresh, optimizer, [AdaNorm(target=target)]) as attachment:
        attachment.load_state_dict(saved["regrad"])
        for index in range(17, STEPS):
            optimizer.zero_grad()
            fresh(index).backward()
            optimizer.step()
            assert torch.equal(fresh.weight, expected[index])


def test_metrics_say_how_far_gradients_were_scaled():
    model, correction = Model(), AdaNorm(decay=0.5)
    optimizer = torch.optim.Adam(model.parameters())
    assert correction.metrics() == {"largest_scale": 1.0}
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for size in (4.0, 1.0):
            optimizer.zero_grad()
            model(0, torch.tensor([[size, 0, 0], [0, 0, 0]], dtype=torch.float64)).backward()
            optimizer.step()
        # e: 2, then 1.5
        assert attachment.metrics()["adanorm/largest_scale"] == pytest.approx(1.5, abs=1e-12)
        # the first step has no moment to measure
        assert attachment.metrics()["adanorm/moment/trigger_rate"] == 1.0


class Foreign(torch.optim.Adam):
    """The same state under another class."""


def test_the_receipt_names_the_stage_of_the_target():
    for target in ("moment", "gradient"):
        model = Model()
        with regrad.attach(
            model, torch.optim.Adam(model.parameters()), [AdaNorm(target=target)]
        ) as attachment:
            assert attachment.receipt()["corrections"][0]["stages"] == [target]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Foreign,
            r"must know where Foreign keeps its first moment, .* Adam, .*use one of them, or target=",
        ),
        (
            lambda p: torch.optim.RMSprop(p, momentum=0.9),
            "must know where RMSprop keeps its first moment",
        ),
        (lambda p: torch.optim.Adam(p, betas=(0.0, 0.9)), r"betas\[0\] must be positive, got 0\.0"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "momentum must be positive, got 0"),
    ],
)
def test_an_optimizer_without_a_known_first_moment_is_refused_with_the_reason(make, message):
    model = Model()
    with pytest.raises(regrad.RegradError, match=message):
        regrad.attach(model, make(model.parameters()), ["adanorm"])
    regrad.attach(model, make(model.parameters()), ["adanorm:target=gradient"]).detach()


def test_a_group_without_momentum_that_comes_later_is_refused_at_its_step():
    model = Model()
    model.other = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    with regrad.attach(model, optimizer, ["adanorm"]):
        optimizer.add_param_group({"params": [model.other], "momentum": 0.0})
        (model(0) + model.other.sum()).backward()
        with pytest.raises(regrad.RegradError, match="momentum must be positive, got 0"):
            optimizer.step()


@pytest.mark.parametrize("target", ["moment", "gradient"])
def test_complex_parameters_are_refused(target):
    model = torch.nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(regrad.RegradError, match="'adanorm' has no rule for complex parameters"):
        regrad.attach(model, torch.optim.Adam(model.parameters()), [AdaNorm(target=target)])


def test_sparse_gradients_are_refused():
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrad.attach(model, optimizer, ["adanorm"]):
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(
            regrad.RegradError, match="adanorm must not see sparse gradients, got them for"
        ):
            optimizer.step()


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan, math.inf])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\), got {decay!r}"):
        AdaNorm(decay=decay)


def test_unfit_options_are_refused():
    with pytest.raises(
        TypeError,
        match="adanorm has no option 'decai'; allowed: decay, target; did you mean 'decay'",
    ):
        AdaNorm(decai=0.5)
    with pytest.raises(TypeError, match=r"target must be .*, got 'weights'"):
        AdaNorm(target="weights")


@settings(max_examples=25)
@given(
    decay=st.floats(0, 0.99),
    sizes=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=2, max_size=8),
    momentum=st.floats(0.1, 0.99),
    weight_decay=st.sampled_from([0.0, 0.01]),
)
def test_any_sequence_of_norms_follows_the_reference(
    decay, sizes, momentum, weight_decay, reference
):
    model = Model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=momentum, weight_decay=weight_decay
    )
    plain = reference.SGD(
        rule=reference.Rule(decay), momentum=momentum, decay=weight_decay, rate=0.01
    )
    weight = start()
    with regrad.attach(model, optimizer, [AdaNorm(decay=decay)]):
        for index, size in enumerate(sizes):
            gradient = size * gradient_at(torch.zeros(()), index)
            optimizer.zero_grad()
            model(index, gradient).backward()
            optimizer.step()
            weight = plain.step(weight, gradient)
    torch.testing.assert_close(
        model.weight.detach(), weight, rtol=1e-10, atol=1e-11 * (1 + max(sizes))
    )


class Watched(AdaNorm):
    """Fails where the correction would wait for the device."""

    def correct_moments(self, step):
        with no_waiting():
            super().correct_moments(step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_gpu_trains_as_the_cpu_without_waiting(decay):
    here, there = Model(), Model().cuda()
    expected = run(here, torch.optim.Adam(here.parameters(), weight_decay=decay))
    optimizer = torch.optim.Adam(there.parameters(), weight_decay=decay)
    with regrad.attach(there, optimizer, [Watched()]):
        for index in range(STEPS):
            optimizer.zero_grad()
            there(index, gradient_at(there.weight.detach().cpu(), index).cuda()).backward()
            optimizer.step()
    torch.testing.assert_close(there.weight.detach().cpu(), expected[-1], rtol=1e-10, atol=1e-12)
