import io
import math
import warnings

import pytest
import regrad
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad_gcw import GCW
from regrad_testing.clauses import tensors_in

WIDTH = 7


class Noisy(torch.nn.Module):
    """½ wᵀ H w − b_tᵀ w with another b at every call, so gradients are noisy and the same in every run."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.register_buffer("matrix", (half @ half.T / WIDTH).to(dtype))
        self.offsets = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = torch.nn.Parameter(
            torch.randn(WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.calls = 0

    def forward(self):
        self.calls += 1
        return (
            0.5 * self.weight @ self.matrix @ self.weight
            - self.offsets[self.calls - 1] @ self.weight
        )


def sgd(p, **options):
    return torch.optim.SGD(p, lr=0.02, **{"momentum": 0.9, **options})


def train(model, optimizer, steps, *corrections, rates=None):
    """Return raw gradients, what `.grad` became, and the weights, after each step."""
    raw, seen, weights = [], [], []
    with regrad.attach(model, optimizer, corrections) as attachment:
        for index in range(steps):
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[index]
            optimizer.zero_grad()
            model().backward()
            raw.append(model.weight.grad.clone())
            optimizer.step()
            seen.append(model.weight.grad.clone())
            weights.append(model.weight.detach().clone())
        metrics = attachment.metrics()
    return raw, seen, weights, metrics


CASES = [
    {},
    {"predictor": "prior"},
    {"predictor": "attention"},
    {"fit_target": "hindsight"},
    {"fit_target": "hindsight", "predictor": "attention", "fit_every": 4},
    {"norm": "keep"},
    {"gate": False},
    {"gate": False, "predictor": "attention"},
    {"slots": ("last",)},
    {"slots": ("slow", "last"), "fit_every": 3, "predictor": "attention"},
    {"slots": ("fast", "slow"), "fit_every": 3},
    {"warmup_steps": 0, "fit_every": 1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_gradient_is_that_of_the_reference(options, seed, reference):
    model = Noisy(seed)
    raw, seen, _, metrics = train(model, sgd(model.parameters()), 65, GCW(layers="all", **options))
    rule = reference.Tensor(WIDTH, 0.9, **options)
    for index, (gradient, got) in enumerate(zip(raw, seen, strict=True)):
        expected = torch.tensor(rule.correct(gradient.tolist()), dtype=torch.float64)
        scale = gradient.norm().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * scale, msg=f"step {index}")
    for slot, learned in zip(rule.names, rule.learned, strict=True):
        assert metrics[f"gcw/a_{slot}"] == pytest.approx(learned, rel=1e-9, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 30),
    prior=st.floats(-1, 2),
    every=st.integers(1, 6),
    warmup=st.integers(0, 5),
    predictor=st.sampled_from(["slot", "prior"]),
    target=st.sampled_from(["next", "hindsight"]),
)
def test_any_options_follow_the_reference(seed, prior, every, warmup, predictor, target, reference):
    options = {
        "fit_every": every,
        "warmup_steps": warmup,
        "predictor": predictor,
        "fit_target": target,
    }
    model = Noisy(seed)
    raw, seen, _, _ = train(
        model, sgd(model.parameters()), 20, GCW(layers="all", prior=prior, **options)
    )
    rule = reference.Tensor(WIDTH, prior, **options)
    for gradient, got in zip(raw, seen, strict=True):
        expected = torch.tensor(rule.correct(gradient.tolist()), dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * gradient.norm().item())


PRIOR = {"layers": "all", "predictor": "prior", "gate": False, "warmup_steps": 0}


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("slots", [("last",), ("last", "fast", "slow")])
def test_the_prior_is_torchs_nesterov_under_any_schedule(momentum, slots):
    rates = [0.05 * (1 + math.cos(0.1 * t)) + 1e-3 for t in range(60)]
    ours, theirs = Noisy(), Noisy()
    *_, weights, _ = train(
        ours, sgd(ours.parameters(), momentum=momentum), 60, GCW(**PRIOR, slots=slots), rates=rates
    )
    *_, expected, _ = train(
        theirs, sgd(theirs.parameters(), momentum=momentum, nesterov=True), 60, rates=rates
    )
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-15)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.Adagrad(p, lr=0.02),
        lambda p: torch.optim.Adamax(p, lr=0.02),
    ],
)
@pytest.mark.parametrize("norm", ["free", "keep"])
def test_coefficients_of_zero_change_no_bit(make, norm):
    ours, plain = Noisy(), Noisy()
    *_, weights, _ = train(ours, make(ours.parameters()), 30, GCW(**PRIOR, prior=0.0, norm=norm))
    *_, expected, _ = train(plain, make(plain.parameters()), 30)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.AdamW(p, lr=0.02)])
def test_the_warm_up_changes_no_bit_and_ends_when_it_says(make):
    ours, plain = Noisy(), Noisy()
    *_, weights, _ = train(ours, make(ours.parameters()), 12, GCW(layers="all", warmup_steps=11))
    *_, expected, _ = train(plain, make(plain.parameters()), 12)
    same = [torch.equal(a, b) for a, b in zip(weights, expected, strict=True)]
    assert same == [True] * 11 + [False]


def test_two_offsets_by_hand():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    slopes = iter([1.0, 3.0, 2.0])
    model.forward = lambda: model.weight.sum() * next(slopes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    _, seen, weights, _ = train(model, optimizer, 3, GCW(**PRIOR))
    # 1 + .5·(1 − 0), 3 + .5·(3 − 1), 2 + .5·(2 − 3); buffers 1.5, 4.75, 3.875
    assert [g.item() for g in seen] == [1.5, 4.0, 1.5]
    assert [w.item() for w in weights] == [-1.5, -6.25, -10.125]


MOMENTS = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.Adam, {"maximize": True, "fused": True}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": True}),
    (torch.optim.AdamW, {"maximize": True, "betas": (0.7, 0.99)}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {"maximize": True}),
]


@pytest.mark.parametrize(("cls", "options"), MOMENTS, ids=str)
def test_the_offset_enters_the_first_moment_only(cls, options, reference):
    model = Noisy()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    keep = optimizer.param_groups[0]["betas"][0]
    decay = options.get("weight_decay", 0.0) if cls is torch.optim.Adam else 0.0
    sign = -1.0 if options.get("maximize") else 1.0
    rule, moment = (
        reference.Tensor(WIDTH, keep, predictor="slot"),
        torch.zeros(WIDTH, dtype=torch.float64),
    )
    twin_weight = torch.nn.Parameter(model.weight.detach().clone())
    twin = cls(
        [twin_weight], lr=0.0, **options
    )  # fed the raw gradients: its second moment is the plain one
    with regrad.attach(model, optimizer, [GCW(layers="all")]):
        for _ in range(45):
            optimizer.zero_grad()
            model().backward()
            raw, before = model.weight.grad.clone(), model.weight.detach().clone()
            twin_weight.data.copy_(before)
            twin_weight.grad = raw.clone()
            twin.step()
            optimizer.step()
            corrected = torch.tensor(rule.correct(raw.tolist()), dtype=torch.float64)
            moment = keep * moment + (1 - keep) * (sign * corrected + decay * before)
            state = optimizer.state[model.weight]
            assert torch.equal(model.weight.grad, raw)
            torch.testing.assert_close(state["exp_avg"], moment, rtol=0, atol=1e-12)
            for key in ("exp_avg_sq", "exp_inf"):
                if key in state:
                    torch.testing.assert_close(
                        state[key], twin.state[twin_weight][key], rtol=1e-13, atol=0
                    )


class ForeignAdam(torch.optim.Adam):
    """The same keys under another class: its state must not be written."""


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda p: ForeignAdam(p, lr=0.01), {}),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"target": "gradient"}),
        (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.99)), {"prior": 0.5}),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), {"prior": 0.5}),
    ],
)
def test_elsewhere_and_on_request_the_gradient_is_corrected(make, options, reference):
    model = Noisy()
    raw, seen, _, _ = train(model, make(model.parameters()), 30, GCW(layers="all", **options))
    rule = reference.Tensor(WIDTH, options.get("prior", 0.9))
    for gradient, got in zip(raw, seen, strict=True):
        expected = torch.tensor(rule.correct(gradient.tolist()), dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_nothing_is_due_in_a_moment_that_does_not_exist_yet():
    ours, plain = Noisy(), Noisy()
    make = lambda p: torch.optim.AdamW(p, lr=0.02)  # noqa: E731
    *_, weights, _ = train(ours, make(ours.parameters()), 2, GCW(layers="all", warmup_steps=0))
    *_, expected, _ = train(plain, make(plain.parameters()), 2)
    assert torch.equal(weights[0], expected[0])
    assert not torch.equal(weights[1], expected[1])


@pytest.mark.parametrize(
    "options", [{}, {"predictor": "attention"}, {"fit_target": "hindsight"}], ids=str
)
@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.AdamW(p, lr=0.02)])
@pytest.mark.parametrize("at", [3, 24])
def test_a_resumed_run_is_the_same_bit_for_bit(options, make, at):
    through, resumed, fresh = Noisy(), Noisy(), Noisy()
    *_, expected, _ = train(through, make(through.parameters()), 60, GCW(layers="all", **options))
    optimizer = make(resumed.parameters())
    with regrad.attach(resumed, optimizer, [GCW(layers="all", **options)]) as attachment:
        for _ in range(at):
            optimizer.zero_grad()
            resumed().backward()
            optimizer.step()
        saved = _as_saved([resumed.state_dict(), optimizer.state_dict()])
        state = attachment.state_dict()
        for _ in range(5):  # what a state holds must be copies
            optimizer.zero_grad()
            resumed().backward()
            optimizer.step()
    optimizer, fresh.calls = make(fresh.parameters()), at
    fresh.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with regrad.attach(fresh, optimizer, [GCW(layers="all", **options)]) as attachment:
        attachment.load_state_dict(_as_saved(state))
        for want in expected[at:]:
            optimizer.zero_grad()
            fresh().backward()
            optimizer.step()
            assert torch.equal(fresh.weight, want)


def _as_saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_window_is_closed_after_a_resume_though_its_tensor_gets_no_gradient_any_more():
    model = torch.nn.ModuleDict({key: torch.nn.Linear(3, 1) for key in ("a", "b")})
    model.forward = lambda both: (
        model["a"](torch.ones(3)).sum() + (model["b"](torch.ones(3)).sum() if both else 0.0)
    )
    optimizer, state = sgd(model.parameters()), None
    for both in (True, False):
        with regrad.attach(
            model, optimizer, [GCW(layers="all", warmup_steps=0, fit_every=8)]
        ) as attachment:
            if state:
                attachment.load_state_dict(_as_saved(state))
            for _ in range(6):
                optimizer.zero_grad()
                model(both).backward()
                optimizer.step()
            state = attachment.state_dict()
    kept = state["corrections"]["gcw"]
    assert {name: memory["rows"] for name, memory in kept.items()} == {
        "a.weight": 3,
        "a.bias": 3,
        "b.weight": 0,
        "b.bias": 0,
    }


def test_none_frozen_zero_and_infinite_gradients():
    model = torch.nn.ModuleDict(
        {key: torch.nn.Linear(3, 1, bias=False) for key in ("often", "rare", "zero", "frozen")}
    )
    model["frozen"].weight.requires_grad_(False)

    def forward(index):
        x = torch.ones(2, 3) * (math.inf if index == 4 else 1.0 + index % 3)
        y = (
            model["often"](x).sum()
            + 0 * model["zero"](torch.ones(2, 3)).sum()
            + model["frozen"](x).sum()
        )
        return y + model["rare"](x).sum() if index % 4 == 0 else y

    model.forward = forward
    optimizer = sgd(model.parameters())
    correction = GCW(layers="all", warmup_steps=0, fit_every=3)
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for index in range(20):
            optimizer.zero_grad()
            model(index).backward()
            optimizer.step()
        state = attachment.state_dict()["corrections"]["gcw"]
    assert set(state) == {"often.weight", "rare.weight", "zero.weight"}
    assert state["often.weight"]["seen"] == 20
    assert state["rare.weight"]["seen"] == 5
    for kept in state.values():
        assert all(kept["learning"][0][key].isfinite().all() for key in ("learned", "used", "gate"))
        assert all(row.isfinite().all() for row in kept["history"].values())
    assert not model["zero"].weight.grad.any()


def test_a_gradient_in_bf16_keeps_its_slots_in_float32():
    model = Noisy(dtype=torch.bfloat16)
    raw, seen, _, _ = train(
        model, sgd(model.parameters()), 30, correction := GCW(layers="all", warmup_steps=2)
    )
    assert seen[-1].dtype == torch.bfloat16
    assert not torch.equal(raw[3], seen[3])
    assert correction.state_dict()["weight"]["history"][0].dtype == torch.float32


@pytest.mark.parametrize(("slots", "copies"), [(("last", "fast", "slow"), 4), (("last",), 2)])
def test_memory_is_one_copy_per_slot_and_one(slots, copies):
    model = torch.nn.Linear(100, 100)
    optimizer = sgd(model.parameters())
    with regrad.attach(model, optimizer, [correction := GCW(layers=("weight",), slots=slots)]):
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
    kept = sum(t.numel() for t in tensors_in(correction.state_dict()["weight"]).values())
    assert copies * 10_000 <= kept < copies * 10_000 + 2_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "conv1"}, r"layers must be 'stages', 'all' or a list of names, got 'conv1'"),
        ({"layers": ()}, r"layers must be 'stages', 'all' or a list of names, got \(\)"),
        ({"slots": ()}, r"slots must be some of last, fast, slow, got \(\)"),
        (
            {"slots": ("last", "last")},
            r"slots must be some of last, fast, slow, got \('last', 'last'\)",
        ),
        ({"slots": ("first",)}, r"slots must be some of last, fast, slow, got \('first',\)"),
        ({"prior": 2.5}, r"prior must be in \[-1, 2\], got 2\.5"),
        ({"prior": math.nan}, r"prior must be in \[-1, 2\], got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"fit_every": 0}, "fit_every must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GCW(**options)


def test_an_unknown_option_or_choice_is_refused():
    with pytest.raises(
        TypeError, match=r"gcw has no option 'slot'; allowed: .*did you mean 'slots'"
    ):
        GCW(slot=("last",))
    with pytest.raises(
        TypeError, match=r"predictor must be .*'slot', 'attention', 'prior'.*, got 'mlp'"
    ):
        GCW(predictor="mlp")


@pytest.mark.parametrize("make", [lambda p: sgd(p, nesterov=True), torch.optim.NAdam])
def test_an_optimizer_that_looks_ahead_is_refused_unless_allowed(make):
    model = Noisy()
    with pytest.raises(
        regrad.RegradError,
        match=r"would look ahead twice; use nesterov=False, or allow_double_look",
    ):
        regrad.attach(model, make(model.parameters()), [GCW(layers="all")])
    regrad.attach(
        model, make(model.parameters()), [GCW(layers="all", allow_double_lookahead=True)]
    ).detach()


class Ahead(regrad.Correction):
    """Owns the look-ahead as xgrad does, which the tests of this plugin cannot import."""

    name = "ahead"
    needs = regrad.correction.Needs(stages=("gradient",), exclusive=("look-ahead",))

    def correct_gradients(self, step):
        """Do nothing."""


def test_a_second_correction_that_looks_ahead_is_refused_unless_allowed():
    model = Noisy()
    with pytest.raises(regrad.RegradError, match="cannot work together: both own the look-ahead"):
        regrad.attach(model, sgd(model.parameters()), [GCW(layers="all"), Ahead()])
    allowed = GCW(layers="all", allow_double_lookahead=True)
    regrad.attach(model, sgd(model.parameters()), [allowed, Ahead()]).detach()


def test_complex_parameters_are_refused():
    model = torch.nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(regrad.RegradError, match="no rule for complex parameters"):
        regrad.attach(model, torch.optim.Adam(model.parameters()), [GCW(layers="all")])


def test_the_control_is_nesterov_on_sgd_with_momentum_and_nadam_on_adam():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    control = GCW().control(sgd(weight))
    assert control.name == "nesterov"
    assert control.optimizer == {"nesterov": True}
    assert GCW().control(torch.optim.SGD(weight, lr=0.1)) is None
    assert GCW().control(sgd(weight, dampening=0.1)) is None
    assert GCW().control(torch.optim.RMSprop(weight)) is None
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        control = GCW().control(kind(weight))
        assert control.name == "nadam"
        assert control.optimizer_class is torch.optim.NAdam


def test_no_random_number_is_drawn_and_two_runs_are_equal():
    runs = []
    for _ in range(2):
        model, before = Noisy(), torch.get_rng_state()
        runs.append(
            train(model, sgd(model.parameters()), 40, GCW(layers="all", predictor="attention"))[2][
                -1
            ]
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*runs)


def test_idle_reasons_name_what_is_missing():
    assert GCW().idle_reason() == "layers matched no tensor that got a gradient"
    model = Noisy()
    options = {**PRIOR, "prior": 0.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            model, torch.optim.SGD(model.parameters(), lr=0.01), 200, correction := GCW(**options)
        )
    assert "'gcw' had no effect in 200 steps: the coefficients stayed at 0" in str(
        caught[0].message
    )
    state = correction.state_dict()
    state["weight"]["learning"][0]["gate"].zero_()
    correction.load_state_dict(state)
    assert correction.idle_reason() == "the gate switched all 1 tensors off"
    assert correction.metrics() == {
        "a_last": 0,
        "a_fast": 0,
        "a_slow": 0,
        "share_learned": 0,
        "share_on": 0,
    }


def test_an_offset_that_points_uphill_is_switched_off():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    signs = torch.tensor([[(-1.0) ** t, 0.5] for t in range(60)], dtype=torch.float64)
    calls = iter(range(60))
    model.forward = lambda: model.weight @ signs[next(calls)]
    correction = GCW(layers="all", predictor="prior", slots=("last",))
    raw, seen, _, metrics = train(model, sgd(model.parameters()), 40, correction)
    # g alternates, so g − g_last points against the next gradient in every step
    assert metrics["gcw/share_on"] == 0
    assert not torch.equal(raw[15], seen[15])
    assert torch.equal(raw[-1], seen[-1])
