"""The three corrections in the loops that people have."""

import re

import pytest
import regrad
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad import Correction
from regrad.correction import Needs
from regrad_clipping import AGC, ClipNorm, ClipUpdate, ClipValue
from torch import nn

SPECS = ["clip-norm:max_norm=0.05", "clip-value:max_value=0.01", "agc:max_ratio=0.02"]


def make_model(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def batches(count=5, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model, inputs, target):
    return nn.functional.cross_entropy(model(inputs), target)


def train(model, corrections, *, parts=1, make=None, clip=None, data=None):
    optimizer = make(model) if make else torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with regrad.attach(model, optimizer, corrections) as attachment:
        for inputs, target in data or batches(dtype=next(model.parameters()).dtype):
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                (loss_of(model, x, y) / parts).backward()
            if clip:
                clip(model)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], attachment.metrics()


def by_the_reference(reference, max_ratio=0.02):
    """Return what clips all but the head's weight, as the loop would."""

    def clip(model):
        for name, p in model.named_parameters():
            if name != "2.weight":
                module, attribute = model[int(name[0])], name[2:]
                every = reference.units(module, attribute, p.shape)
                p.grad = reference.clip_adaptive(p.grad, p.detach(), every, max_ratio, 1e-3).view(
                    p.shape
                )

    return clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("correction", "clip"),
    [
        (ClipNorm(max_norm=0.05), lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)),
        (ClipValue(max_value=0.01), lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01)),
    ],
    ids=["norm", "value"],
)
def test_training_is_that_with_torchs_own_clipping_to_the_bit(correction, clip, dtype):
    ours, metrics = train(make_model(dtype), [correction])
    theirs, _ = train(make_model(dtype), [], clip=clip)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert metrics[f"{correction.name}/gradient/trigger_rate"] == 1


def test_training_with_agc_is_that_of_the_reference(reference):
    ours, metrics = train(make_model(torch.float64), ["agc:max_ratio=0.02"])
    theirs, _ = train(make_model(torch.float64), [], clip=by_the_reference(reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    assert metrics["agc/gradient/trigger_rate"] == 1
    assert 0 < metrics["agc/share_clipped"] <= 1


@pytest.mark.parametrize(
    "spec", ["clip-norm:max_norm=1e9", "clip-value:max_value=1e9", "agc:max_ratio=1e9"]
)
def test_a_bound_that_is_never_reached_changes_no_bit(spec):
    ours, metrics = train(make_model(), [spec])
    plain, _ = train(make_model(), [])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert metrics[f"{spec.partition(':')[0]}/gradient/trigger_rate"] == 0


# Where a graph breaks, dynamo itself looks at `.grad` of what crosses the break, and hides the warning by a log filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_a_model_compiled_after_attach_trains_as_the_plain_one(spec):
    plain, _ = train(make_model(), [spec])
    torch.compiler.reset()  # code compiled for another model of the class would run without this one's hooks
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with regrad.attach(model, optimizer, [spec]):
        compiled = torch.compile(model, backend="eager")
        for inputs, target in batches():
            optimizer.zero_grad()
            loss_of(compiled, inputs, target).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_lbfgs_is_borne(spec):
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    (inputs, target), *_ = batches()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, target)
        loss.backward()
        return loss

    with regrad.attach(model, optimizer, [spec]):
        optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_parameters_missing_and_zero_gradients_are_left_alone(spec):
    model = make_model()
    model[0].weight.requires_grad_(requires_grad=False)
    frozen = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [spec]):
        model(torch.ones(2, 6))
        optimizer.step()
        model(torch.ones(2, 6)).sum().mul(0).backward()
        model[2].weight.grad = None
        optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is None
    assert not model[0].bias.grad.any()


def test_a_tensor_that_starts_at_zero_moves_under_agc():
    model = make_model()
    nn.init.zeros_(model[0].weight)
    train(model, ["agc"])
    assert model[0].weight.any()


def test_parameters_that_come_later_are_clipped_too():
    model = make_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["agc:max_ratio=1e-6"]):
        for index, (inputs, target) in enumerate(batches()):
            if index == 1:
                optimizer.add_param_group({"params": list(model[0].parameters())})
                model.append(nn.Linear(3, 3))
                optimizer.add_param_group({"params": list(model[3].parameters())})
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
    for weight in (model[0].weight, model[3].weight):
        assert (weight.grad.norm(dim=1) <= 1e-6 * weight.norm(dim=1) * 1.01).all()


def test_without_a_recorded_forward_agc_asks_for_the_head():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, target = batches()[0]
    loss = nn.functional.cross_entropy(model.forward(inputs), target)
    with regrad.attach(model, optimizer, ["agc"]):
        loss.backward()
        with pytest.raises(
            regrad.RegradError,
            match=r"saw no classifier head in a training forward \(.*\); pass head='name'",
        ):
            optimizer.step()


@pytest.mark.parametrize("listed", ["in order", "reversed"])
@pytest.mark.parametrize("last", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))])
def test_of_several_modules_the_one_that_is_called_last_has_the_head(listed, last):
    encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh())  # units of ReLU may all be dead
    parts = [encoder, last] if listed == "in order" else [last, encoder]
    place = parts.index(last)
    optimizer = torch.optim.SGD(nn.ModuleList(parts).parameters(), lr=0.1)
    with regrad.attach(parts, optimizer, ["agc:max_ratio=1e-6"]) as attachment:
        for _ in range(2):
            optimizer.zero_grad()
            last(encoder(torch.ones(6, 5))).square().sum().backward()
            optimizer.step()
        inner = f"{place}.1.weight" if isinstance(last, nn.Sequential) else f"{place}.weight"
        assert f"leaves the classifier head alone: {inner}" in str(attachment)
        head = last[1] if isinstance(last, nn.Sequential) else last
        assert head.weight.grad.norm() > 1e-3
        assert encoder[0].weight.grad.norm() < 1e-3


def test_a_model_without_a_forward_of_its_own_is_refused_at_attach():
    model = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(regrad.RegradError, match="ModuleList has none; attach the modules that"):
        regrad.attach(model, optimizer, ["agc"])
    regrad.attach(model, optimizer, ["agc:head=1"]).detach()
    regrad.attach(model, optimizer, ["agc:head=none"]).detach()


class Before(Correction):
    """Stands for a correction that clipping must follow."""

    name = "centralization"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        """Do nothing."""


@pytest.mark.parametrize("spec", SPECS)
def test_clipping_acts_last(spec):
    model = make_model()
    with regrad.attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [spec, Before()]
    ) as attachment:
        assert [c.name for c in attachment.corrections] == [
            "centralization",
            spec.partition(":")[0],
        ]
        assert "declares after 'centralization'" in str(attachment)


def test_explain_shows_what_would_be_clipped_and_changes_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, target = batches()[0]
    before = [p.detach().clone() for p in model.parameters()]
    with regrad.attach(
        model, optimizer, ["agc:max_ratio=1e-4"], nn.CrossEntropyLoss()
    ) as attachment:
        rows = attachment.explain((inputs, target)).rows
        assert {row["tensor"]: row["relative_change"] > 0 for row in rows} == {
            **{"0.weight": True, "0.bias": True},
            **{"2.weight": False, "2.bias": True},
        }
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_clipping_has_no_state_and_a_resumed_run_continues_to_the_bit():
    model = make_model()
    whole, _ = train(model, SPECS)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    state = None
    for part in (slice(0, 2), slice(2, 5)):
        with regrad.attach(model, optimizer, SPECS) as attachment:
            if state:
                attachment.load_state_dict(state)
            for inputs, target in batches()[part]:
                optimizer.zero_grad()
                loss_of(model, inputs, target).backward()
                optimizer.step()
            state = attachment.state_dict()
            assert not any(state["corrections"].values())
    assert state["receipt"]["steps_applied"] == 5
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))


def test_metrics_are_the_norm_before_and_the_share_after():
    model = make_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(
        model, optimizer, ["clip-norm:max_norm=0.01", "agc:max_ratio=1e6"]
    ) as attachment:
        assert "clip-norm/norm" not in attachment.metrics()
        loss_of(model, *batches(dtype=torch.float64)[0]).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        optimizer.step()
        assert attachment.metrics()["clip-norm/norm"] == norm
        assert attachment.metrics()["agc/share_clipped"] == 0


def test_a_bound_never_reached_is_a_warning_for_agc_only():
    assert ClipNorm().idle_reason() is None
    assert ClipValue().idle_reason() is None
    assert (
        AGC().idle_reason()
        == "threshold never reached: no unit's gradient exceeded 0.01 of its weights"
    )


def test_clip_norm_notes_where_its_optimizer_holds_a_part_of_the_model():
    model = make_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    attachment = regrad.attach(model, optimizer, ["clip-norm"])
    assert "'clip-norm' reads the norm of 2 of 4 trainable parameters" in str(attachment)
    attachment.detach()
    model[0].requires_grad_(False)
    assert str(regrad.attach(model, optimizer, ["clip-norm"])).count("\n") == 0


def test_agc_reads_the_whole_model_only_to_find_the_head():
    assert "model" in AGC().needs.reads
    assert AGC().needs.record
    for head in (None, "0"):
        assert AGC(head=head).needs.reads == ("units",)
        assert not AGC(head=head).needs.record


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_adaptive_clipping_and_clipping_by_the_global_norm_are_each_others_control(kind):
    optimizer = kind(make_model().parameters())
    assert AGC().control(optimizer).corrections == ("clip-norm",)
    assert ClipNorm().control(optimizer).corrections == ("agc",)
    assert ClipValue().control(optimizer) is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ClipNorm, {"max_norm": 0}, "max_norm must be positive, got 0"),
        (ClipNorm, {"max_norm": float("inf")}, "max_norm must be positive, got inf"),
        (ClipValue, {"max_value": -1.0}, "max_value must be positive, got -1.0"),
        (AGC, {"max_ratio": 0.0}, "max_ratio must be positive, got 0.0"),
        (AGC, {"weight_floor": float("nan")}, "weight_floor must be positive, got nan"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**options)


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(
        TypeError,
        match=r"agc has no option 'max_ration'; allowed: max_ratio, .*did you mean 'max_rat",
    ):
        AGC(max_ration=1.0)


def test_only_torchs_numbers_come_out_where_a_gradient_is_not_finite():
    for spec, clip in (
        ("clip-norm:max_norm=0.05", lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)),
        ("clip-value:max_value=0.01", lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01)),
    ):
        inputs, target = batches()[0]
        data = [(inputs.clone().index_fill_(0, torch.tensor([0]), torch.inf), target)]
        ours, _ = train(make_model(), [spec], data=data)
        theirs, _ = train(make_model(), [], clip=clip, data=data)
        assert all(
            torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in zip(ours, theirs, strict=True)
        )


@given(seed=st.integers(0, 50), max_ratio=st.floats(1e-4, 0.5))
def test_agc_follows_the_reference_for_any_ratio(seed, max_ratio, reference):
    ours, _ = train(
        make_model(torch.float64, seed),
        [AGC(max_ratio=max_ratio)],
        data=batches(2, dtype=torch.float64),
    )
    theirs, _ = train(
        make_model(torch.float64, seed),
        [],
        clip=by_the_reference(reference, max_ratio),
        data=batches(2, dtype=torch.float64),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Complex(nn.Module):
    """One complex parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3 + 4j, 0.5j], dtype=torch.complex64))

    def forward(self):
        return (self.weight.conj() * self.weight).real.sum()


def test_clipping_by_value_refuses_complex_parameters_at_attach():
    model = Complex()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(regrad.RegradError, match="'clip-value' has no rule for complex"):
        regrad.attach(model, optimizer, ["clip-value"])


def test_clipping_by_norm_takes_complex_parameters_and_is_measured():
    model = Complex()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = regrad.attach(model, optimizer, ["clip-norm:max_norm=1.0"])
    model().backward()
    before = model.weight.grad.clone()
    optimizer.step()
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    effect = attachment.receipt()["effects"]["clip-norm"]["gradient"]
    assert effect["relative_change"] == pytest.approx(1 - 1 / before.norm().item(), rel=1e-5)


def steps_of(corrections, make, data):
    """Return the root mean square of each tensor's first step, in units of the rate .01."""
    model = make_model(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    ends, metrics = train(model, corrections, make=make, data=data)
    pairs = zip(ends, before, strict=True)
    return [((end - start) / 0.01).square().mean().sqrt().item() for end, start in pairs], metrics


def test_no_tensor_moves_further_than_the_bound_and_only_those_beyond_it_are_changed():
    def make(model):
        return torch.optim.SGD(model.parameters(), lr=0.01)

    data = batches(count=1, dtype=torch.float64)
    plain, _ = steps_of([], make, data)
    bound = sum(sorted(plain)[1:3]) / 2
    clipped, metrics = steps_of([ClipUpdate(max_rms=bound)], make, data)
    assert clipped == pytest.approx([min(rms, bound) for rms in plain])
    assert metrics["clip-update/share_clipped"] == 0.5
    assert metrics["clip-update/smallest_factor"] == pytest.approx(bound / max(plain))


@pytest.mark.parametrize(
    "rate", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_decoupled_decay_is_no_part_of_what_is_clipped(rate):
    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=10.0)

    model = make_model(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    ends, _ = train(
        model, [ClipUpdate(max_rms=1e-9)], make=make, data=batches(1, dtype=torch.float64)
    )
    for end, start in zip(ends, before, strict=True):
        torch.testing.assert_close(end, (1 - 0.1) * start, rtol=0, atol=1e-10)


def test_without_a_first_moment_it_is_stable_adamws_clipping():
    """timm's bound is on the gradient over the root: with a first moment it is another rule."""
    library = pytest.importorskip("timm.optim", reason="timm is not installed")

    def theirs(model):
        return library.AdamWLegacy(
            model.parameters(), lr=0.01, betas=(0.0, 0.9), weight_decay=0.1, clipping_threshold=0.5
        )

    def ours(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.0, 0.9), weight_decay=0.1)

    data = batches(count=20, dtype=torch.float64)
    wanted, _ = train(make_model(torch.float64), [], make=theirs, data=data)
    got, metrics = train(make_model(torch.float64), [ClipUpdate(max_rms=0.5)], make=ours, data=data)
    assert metrics["clip-update/share_clipped"] > 0
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_clipping_of_the_update_must_beat_clipping_of_the_gradient():
    control = ClipUpdate().control(torch.optim.SGD(make_model().parameters()))
    assert control.corrections == ("clip-norm",)


def test_an_optimizer_without_a_rate_is_refused_beside_clipping_of_the_update():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(regrad.RegradError, match="lr must be a number"):
        regrad.attach(model, optimizer, ["clip-update"])
