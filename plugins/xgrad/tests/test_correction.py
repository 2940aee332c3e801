import math
import subprocess
import sys
import warnings

import pytest
import regrad
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad.optimizers import decoupled_decay
from regrad_xgrad import AdaM3, XGrad

RATES = [0.1, 0.1, 0.07, 0.2, 0.0, 0.05, 0.03, 0.11, 0.09, 0.02]
WIDTH = 7


class Quadratic(torch.nn.Module):
    """½ wᵀ H w − bᵀ w, whose gradient is known at every point; keeps the points it was called at."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.register_buffer("matrix", half @ half.T / WIDTH)
        self.register_buffer("offset", torch.randn(WIDTH, generator=generator, dtype=torch.float64))
        self.weight = torch.nn.Parameter(
            torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        )
        self.points = []

    def gradient_at(self, weight):
        return self.matrix @ weight - self.offset

    def forward(self):
        self.points.append(self.weight.detach().clone())
        return 0.5 * self.weight @ self.matrix @ self.weight - self.offset @ self.weight


def run(model, optimizer, rates=RATES, made=None, **options):
    """Train with weight prediction; return the weights after each step, without a gradient where `made` is False."""
    weights = []
    with regrad.attach(model, optimizer, [XGrad(**options)]):
        for rate, has_gradient in zip(rates, made or [True] * len(rates), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss = model()
            if has_gradient:
                loss.backward()
            optimizer.step()
            weights.append(model.weight.detach().clone())
    return weights


def named(make, name):
    return pytest.param(make, id=name)


def sgd(cls=torch.optim.SGD, **options):
    kwargs = {"momentum": 0.9, **options}
    decay = {"decay" if k == "weight_decay" else k: v for k, v in kwargs.items() if k != "foreach"}
    return lambda reference, p: (cls(p, lr=0.1, **kwargs), reference.SGD(**decay))


def rmsprop(**options):
    decay = {"decay" if k == "weight_decay" else k: v for k, v in options.items()}
    return lambda reference, p: (
        torch.optim.RMSprop(p, lr=0.1, **options),
        reference.RMSprop(**decay),
    )


def adam(cls=torch.optim.Adam, **options):
    decoupled = issubclass(cls, torch.optim.AdamW)
    options = {"weight_decay": 0.01 if decoupled else 0.0, **options}
    decay = {
        "decay" if k == "weight_decay" else k: v
        for k, v in options.items()
        if k not in ("fused", "foreach")
    }
    return lambda reference, p: (
        cls(p, lr=0.1, **options),
        reference.Adam(decoupled=decoupled, **decay),
    )


def adam3(**options):
    own = {
        "decay" if key == "weight_decay" else key: value
        for key, value in options.items()
        if key != "foreach"
    }
    return lambda reference, p: (AdaM3(p, lr=0.1, **options), reference.AdaM3(**own))


def adabelief(**options):
    names = {"weight_decay": "decay", "weight_decouple": "decoupled"}

    def make(reference, p):
        library = pytest.importorskip(
            "pytorch_optimizer", reason="AdaBelief comes from pytorch_optimizer, not installed"
        )
        own = {names.get(key, key): value for key, value in options.items() if key != "foreach"}
        return library.AdaBelief(p, lr=0.1, **options), reference.AdaBelief(**own)

    return make


OPTIMIZERS = [
    named(sgd(), "sgd"),
    named(sgd(dampening=0.3), "sgd dampening"),
    named(sgd(weight_decay=0.1), "sgd decay"),
    named(sgd(maximize=True), "sgd maximize"),
    named(sgd(momentum=0.0), "sgd without momentum"),
    named(sgd(foreach=True), "sgd foreach"),
    named(rmsprop(), "rmsprop"),
    named(rmsprop(momentum=0.9), "rmsprop momentum"),
    named(rmsprop(centered=True, eps=1e-2), "rmsprop centered"),
    named(
        rmsprop(centered=True, momentum=0.5, weight_decay=0.1, eps=1e-2),
        "rmsprop centered momentum decay",
    ),
    named(adam(), "adam"),
    named(adam(weight_decay=0.1, amsgrad=True), "adam amsgrad decay"),
    named(adam(fused=True), "adam fused"),
    named(adam(maximize=True), "adam maximize"),
    named(adam(torch.optim.AdamW), "adamw"),
    named(adam(torch.optim.AdamW, amsgrad=True), "adamw amsgrad"),
    named(adam(torch.optim.AdamW, foreach=True), "adamw foreach"),
    named(adam3(eps=1e-3), "adam3"),
    named(adam3(eps=1e-3, weight_decay=0.1, betas=(0.8, 0.9)), "adam3 decay"),
    named(adam3(eps=1e-3, maximize=True, foreach=True), "adam3 maximize foreach"),
    named(adabelief(eps=1e-3), "adabelief"),
    named(adabelief(eps=1e-3, weight_decay=0.1), "adabelief decay"),
    named(adabelief(eps=1e-3, weight_decay=0.1, weight_decouple=False), "adabelief coupled decay"),
    named(adabelief(eps=1e-3, ams_bound=True), "adabelief ams_bound"),
    named(adabelief(eps=1e-3, foreach=True, maximize=True), "adabelief foreach maximize"),
]


@pytest.mark.parametrize("horizon", [0.0, 0.9, 2.0])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_is_that_of_the_reference_at_every_step(make, horizon, reference):
    model = Quadratic()
    optimizer, plain = make(reference, model.parameters())
    start = model.weight.detach().clone()
    rates = [
        r or 0.04 for r in RATES
    ]  # after a rate of 0 the displacement form knows no direction: tested below
    weights = run(model, optimizer, rates, horizon=horizon)
    expected, points = reference.train(start, model.gradient_at, plain, rates, horizon)
    for got, want in zip(model.points + weights, points + expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_first_predictions_are_those_worked_out_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    module = torch.nn.Module()
    module.weight = weight
    seen = []
    module.forward = lambda: seen.append(weight.item()) or weight.square().sum() / 2
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    with regrad.attach(module, optimizer, ["xgrad:horizon=2"]):
        for _ in range(3):
            optimizer.zero_grad()
            module().backward()
            optimizer.step()
    # step 0: at 1, v = 1, w = .9; step 1: at .9 - 2*.1*1 = .7, v = .5 + .7 = 1.2, w = .78; step 2: at .78 - .24 = .54
    assert seen == pytest.approx([1.0, 0.7, 0.54], abs=1e-15)


def test_horizon_zero_changes_no_bit():
    plain, corrected = Quadratic(), Quadratic()
    weights = run(corrected, torch.optim.AdamW(corrected.parameters(), lr=0.1), horizon=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for rate, weight in zip(RATES, weights, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
        assert torch.equal(plain.weight, weight)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_horizon_of_the_momentum_is_nesterov_at_a_constant_rate(momentum):
    ahead, nesterov = Quadratic(), Quadratic()
    optimizer = torch.optim.SGD(ahead.parameters(), lr=0.05, momentum=momentum)
    weights = run(ahead, optimizer, [0.05] * 30, horizon=momentum)
    theirs = torch.optim.SGD(nesterov.parameters(), lr=0.05, momentum=momentum, nesterov=True)
    for weight, point in zip(weights, [*ahead.points[1:], None], strict=True):
        theirs.zero_grad()
        nesterov().backward()
        theirs.step()
        # torch keeps the look-ahead point as its weight: w − lr·μ·v of ours
        buffer = theirs.state[nesterov.weight]["momentum_buffer"]
        seen = nesterov.weight.detach() + 0.05 * momentum * buffer
        torch.testing.assert_close(weight, seen, rtol=0, atol=1e-14)
        if point is not None:
            torch.testing.assert_close(point, nesterov.weight.detach(), rtol=0, atol=1e-14)


def cosine(steps):
    return [0.05 * (1 + math.cos(math.pi * step / steps)) + 1e-4 for step in range(steps)]


@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (lambda reference: reference.Adam(decoupled=True, decay=0.1), 0.1),
        (lambda reference: reference.Adam(amsgrad=True, decay=0.1), 0.0),
        (lambda reference: reference.SGD(momentum=0.9, decay=0.01), 0.0),
        (lambda reference: reference.RMSprop(momentum=0.9, eps=1e-2), 0.0),
        (lambda reference: reference.AdaM3(eps=1e-3, decay=0.1), 0.1),
        (lambda reference: reference.AdaBelief(eps=1e-3, decay=0.1), 0.1),
    ],
    ids=["adamw", "adam amsgrad coupled decay", "sgd", "rmsprop", "adam3", "adabelief"],
)
def test_going_on_along_the_last_step_is_what_the_optimizers_state_says(make, decay, reference):
    """The two references agree: fifty steps under a cosine, where the prediction itself is large."""
    model = Quadratic()
    start = model.weight.detach().clone()
    rates = cosine(50)
    of_state, points = reference.train(start, model.gradient_at, make(reference), rates, 1.0)
    of_steps, their_points = reference.train_from_displacement(
        start, model.gradient_at, make(reference), rates, 1.0, decay, [True] * 50
    )
    for got, want in zip(of_steps + their_points, of_state + points, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    moved = [(p - w).abs().max() for p, w in zip(points[1:], of_state[:-1], strict=True)]
    assert max(moved) > 1e-2


class ForeignAdamW(torch.optim.AdamW):
    """The same numbers under another class: its state must not be read."""


class ForeignAdam(torch.optim.Adam):
    pass


class ForeignSGD(torch.optim.SGD):
    pass


class ForeignRMSprop(torch.optim.RMSprop):
    pass


class ForeignAdaM3(AdaM3):
    pass


@pytest.mark.parametrize(
    ("known", "foreign", "options"),
    [
        (torch.optim.AdamW, ForeignAdamW, {"weight_decay": 0.1}),
        (torch.optim.Adam, ForeignAdam, {"weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.SGD, ForeignSGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.RMSprop, ForeignRMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
        (AdaM3, ForeignAdaM3, {"eps": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_displacement_form_is_the_state_form_under_a_changing_rate(known, foreign, options):
    one, two = Quadratic(), Quadratic()
    rates = [r or 0.04 for r in RATES]
    decay = 0.1 if known in (torch.optim.AdamW, AdaM3) else 0.0
    expected = run(one, known(one.parameters(), lr=0.1, **options), rates)
    got = run(two, foreign(two.parameters(), lr=0.1, **options), rates, decoupled_decay=decay)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


MADE = [True, True, False, True, False, False, True, True, False, True]


@pytest.mark.parametrize("horizon", [1.0, 2.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_displacement_form_with_steps_without_a_gradient_is_the_reference(
    decay, horizon, reference
):
    model = Quadratic()
    start = model.weight.detach().clone()
    rates = [rate or 0.04 for rate in RATES]
    optimizer = ForeignAdamW(model.parameters(), lr=0.1, weight_decay=decay)
    weights = run(model, optimizer, rates, made=MADE, horizon=horizon, decoupled_decay=decay)
    plain = reference.Adam(decoupled=True, decay=decay)
    expected, points = reference.train_from_displacement(
        start, model.gradient_at, plain, rates, horizon, decay, MADE
    )
    for got, want in zip(model.points + weights, points + expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


class Halves(torch.nn.Module):
    """Two matrices, of which a forward uses one or both; keeps the points of the second."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.used, self.idle = (
            torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
            for _ in range(2)
        )
        self.points = []

    def forward(self, both):
        self.points.append(self.idle.detach().clone())
        loss = self.used.square().sum()
        return loss + self.idle.square().sum() if both else loss


DECAYING = {
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.1),
    "foreign": lambda p: ForeignAdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_where_no_step_was_made_the_displacement_form_moves_nothing(make):
    model = Halves()
    optimizer = make(model.parameters())
    options = {"decoupled_decay": 0.1, "allow_double_lookahead": True}
    before = []
    with regrad.attach(model, optimizer, [XGrad(**options)]):
        for both in (True, True, False, False):
            before.append(model.idle.detach().clone())
            optimizer.zero_grad()
            model(both).backward()
            optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(model.points, before, strict=True)]
    # the third forward is predicted from the second step; the fourth from one that was not made
    assert moved == [False, True, True, False]


@pytest.mark.parametrize(
    "rate", [None, "fast", lambda step: 0.1, torch.ones(2)], ids=["none", "text", "rule", "two"]
)
def test_an_optimizer_without_a_rate_is_refused_at_attach_and_when_a_group_comes_later(rate):
    model = Quadratic()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    rule = "lr must be a number in every parameter group of Adagrad, got .*; give it one"
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(regrad.RegradError, match=rule):
        regrad.attach(model, optimizer, ["xgrad"])
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(regrad.RegradError, match=rule):
        regrad.attach(model, optimizer, ["xgrad"])
    optimizer.param_groups[0]["lr"] = 0.1
    with regrad.attach(model, optimizer, ["xgrad"]):
        model().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        with pytest.raises(regrad.RegradError, match=rule):
            model()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"ams_bound": True}], ids=str)
def test_the_displacement_form_of_adabelief_is_its_state_form(options):
    library = pytest.importorskip(
        "pytorch_optimizer", reason="AdaBelief comes from pytorch_optimizer, not installed"
    )
    foreign = type("ForeignAdaBelief", (library.AdaBelief,), {})
    one, two = Quadratic(), Quadratic()
    rates = [r or 0.04 for r in RATES]
    decay = options.get("weight_decay", 0.0)
    expected = run(one, library.AdaBelief(one.parameters(), lr=0.1, eps=1e-3, **options), rates)
    made = foreign(two.parameters(), lr=0.1, eps=1e-3, **options)
    for a, b in zip(run(two, made, rates, decoupled_decay=decay), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


class OfPytorchOptimizer(torch.optim.Adam):
    """Stands in for the library's optimizers where it is absent."""

    __module__ = "pytorch_optimizer.optimizer.adabelief"


@pytest.mark.parametrize(
    ("cls", "group", "decay"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.1),
        (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": False}, 0.0),
        (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.1),
        (torch.optim.SGD, {"weight_decay": 0.1}, 0.0),
        (torch.optim.Muon, {"weight_decay": 0.1}, 0.1),
        (AdaM3, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.1),
        (ForeignSGD, {"weight_decay": 0.0}, 0.0),
        (ForeignSGD, {"weight_decay": 0.1}, None),
        (OfPytorchOptimizer, {"weight_decay": 0.1, "weight_decouple": True}, 0.1),
        (OfPytorchOptimizer, {"weight_decay": 0.1, "weight_decouple": False}, 0.0),
        (
            OfPytorchOptimizer,
            {"weight_decay": 0.1, "weight_decouple": True, "fixed_decay": True},
            None,
        ),
        (OfPytorchOptimizer, {"weight_decay": 0.1}, None),
    ],
)
def test_the_decay_of_an_optimizer_is_known_by_its_class_and_groups(cls, group, decay):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    assert decoupled_decay(cls([weight], lr=0.1), group) == decay


@pytest.mark.long
def test_attaching_imports_no_optional_library():
    body = "import sys, regrad_xgrad; print([m for m in sys.modules if m.startswith('pytorch_optimizer')])"
    assert subprocess.check_output([sys.executable, "-c", body], text=True) == "[]\n"


def test_a_decay_that_is_not_predicted_is_not_asked_about():
    model = Quadratic()
    regrad.attach(model, AdaM3(model.parameters(), weight_decay=0.1), ["xgrad"]).detach()


def test_no_prediction_in_the_step_after_a_rate_of_zero():
    model = Quadratic()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    weights = run(model, optimizer, [0.0, 0.5, 0.5])
    assert torch.equal(model.points[1], weights[0])
    assert not torch.equal(model.points[2], weights[1])
    assert all(torch.isfinite(w).all() for w in weights)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Adadelta])
def test_a_tensor_learning_rate_gives_the_numbers_of_a_float(cls):
    floats, tensors = Quadratic(), Quadratic()
    expected = run(floats, cls(floats.parameters(), lr=0.1))
    optimizer = cls(
        tensors.parameters(),
        lr=torch.tensor(0.1, dtype=torch.float64),
        capturable=False,
        foreach=False,
    )
    rates = [torch.tensor(r, dtype=torch.float64) for r in RATES]
    for a, b in zip(run(tensors, optimizer, rates), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_weights_come_back_bit_for_bit_before_the_update():
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    seen = []
    with regrad.attach(model, optimizer, ["xgrad"]):
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.detach().clone()))
        for _ in range(5):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            model().backward()
            assert not torch.equal(model.weight, before) or not seen
            optimizer.step()
            assert torch.equal(seen[-1], before)


def test_a_parameter_without_a_gradient_stays_whatever_its_momentum():
    model = Halves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrad.attach(model, optimizer, ["xgrad"]):
        for both in (True, False, True):
            optimizer.zero_grad()
            model(both).backward()
            optimizer.step()
            if both:
                weight = model.idle.detach().clone()
    start, after_its_step, without_one = model.points
    # the second forward looks past the first step; the third finds that the second made none
    torch.testing.assert_close(after_its_step, without_one + (without_one - start))
    assert not torch.equal(weight, without_one)


@pytest.mark.parametrize(
    ("cls", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {})]
)
def test_state_survives_a_checkpoint_bit_for_bit(cls, options):
    through, resumed = Quadratic(), Quadratic()
    expected = run(through, cls(through.parameters(), lr=0.1, **options))
    optimizer = cls(resumed.parameters(), lr=0.1, **options)
    saved = {}
    with regrad.attach(resumed, optimizer, [XGrad()]) as attachment:
        for rate in RATES[:4]:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            resumed().backward()
            optimizer.step()
        saved = {
            "model": resumed.state_dict(),
            "optimizer": optimizer.state_dict(),
            "regrad": attachment.state_dict(),
        }
    fresh = Quadratic(seed=1)
    optimizer = cls(fresh.parameters(), lr=0.1, **options)
    fresh.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with regrad.attach(fresh, optimizer, [XGrad()]) as attachment:
        attachment.load_state_dict(saved["regrad"])
        for rate, want in zip(RATES[4:], expected[4:], strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            fresh().backward()
            optimizer.step()
            assert torch.equal(fresh.weight, want)


def test_an_evaluation_in_the_step_predicts_again_to_the_same_point():
    model = Quadratic()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["xgrad"]):
        for index in range(4):
            optimizer.zero_grad()
            model().backward()
            if index == 3:
                model.eval()
                model()
                model.train()
                model().backward()
            optimizer.step()
    assert torch.equal(model.points[3], model.points[5])
    assert not torch.equal(model.points[3], model.points[4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": -1.0}, r"horizon must be at least 0 and finite, got -1\.0"),
        ({"horizon": math.inf}, "horizon must be at least 0 and finite, got inf"),
        ({"horizon": math.nan}, "horizon must be at least 0 and finite, got nan"),
        ({"decoupled_decay": -0.1}, r"decoupled_decay must be at least 0 and finite, got -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        XGrad(**options)


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(
        TypeError,
        match=r"xgrad has no option 'horizons'; allowed: horizon, .*did you mean 'horizon'",
    ):
        XGrad(horizons=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
)
def test_an_optimizer_that_looks_ahead_is_refused_unless_allowed(make):
    model = Quadratic()
    with pytest.raises(
        regrad.RegradError,
        match="would look ahead twice; use nesterov=False, or allow_double_lookahead=True",
    ):
        regrad.attach(model, make(model.parameters()), ["xgrad"])
    regrad.attach(model, make(model.parameters()), ["xgrad:allow_double_lookahead=true"]).detach()


def test_complex_parameters_are_refused():
    model = torch.nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(regrad.RegradError, match="no rule for complex parameters"):
        regrad.attach(model, torch.optim.Adam(model.parameters()), ["xgrad"])


class Outsider(torch.optim.SGD):
    """An optimizer of another library."""

    __module__ = "elsewhere.optimizers"


def test_a_foreign_weight_decay_is_warned_about_until_it_is_told():
    model = Quadratic()
    make = lambda: Outsider(model.parameters(), lr=0.1, weight_decay=0.1)  # noqa: E731
    with pytest.warns(
        regrad.RegradWarning, match="weight_decay that may be decoupled; pass decoupled_decay="
    ):
        regrad.attach(model, make(), ["xgrad"]).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrad.attach(model, make(), ["xgrad:decoupled_decay=0"]).detach()


def test_the_control_is_nesterov_on_sgd_with_momentum_and_nadam_on_adam():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    control = XGrad().control(torch.optim.SGD(weight, lr=0.1, momentum=0.9))
    assert control.name == "nesterov"
    assert control.optimizer == {"nesterov": True}
    assert XGrad().control(torch.optim.SGD(weight, lr=0.1)) is None
    assert XGrad().control(torch.optim.RMSprop(weight)) is None
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        control = XGrad().control(kind(weight))
        assert control.name == "nadam"
        assert control.optimizer_class is torch.optim.NAdam


@given(
    horizon=st.floats(0, 4),
    rates=st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=6),
    seed=st.integers(0, 100),
)
def test_displacement_form_follows_the_reference_for_any_rates(horizon, rates, seed, reference):
    model = Quadratic(seed)
    start = model.weight.detach().clone()
    weights = run(model, torch.optim.SGD(model.parameters(), lr=0.1), rates, horizon=horizon)
    expected, _ = reference.train(
        start, model.gradient_at, reference.SGD(momentum=0.0), rates, horizon
    )
    scale = max(w.abs().max().item() for w in expected) + 1
    torch.testing.assert_close(weights[-1], expected[-1], rtol=1e-9, atol=1e-11 * scale)
