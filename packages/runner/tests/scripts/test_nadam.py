"""NAdam's step, taken by an Adam or AdamW that lives already."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import regrad
import torch
from regrad import RegradError
from regrad.correction import Control
from regrad.optimizers import looks_ahead, nesterov_control
from regrad_runner.scripts.controls import apply_control
from regrad_runner.scripts.nadam import MOMENTUM_DECAY, check_can_be_nadam
from regrad_runner.training.optimizers import of_another_class
from torch import nn
from torch.optim import Adam, AdamW, NAdam

STEPS = 12
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture
def reference():
    """The rule as it is written down, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "nadam_reference", Path(__file__).with_name("reference.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    """Train with each default number format: NAdam keeps a product in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).to(dtype)


def grouped(model):
    """Return the parameters in three groups with settings of their own."""
    return [
        {"params": list(model[0].parameters()), "lr": 0.02, "weight_decay": 0.0},
        {"params": list(model[2].parameters()), "betas": (0.8, 0.95), "eps": 1e-6},
        {"params": list(model[4].parameters()), "lr": 0.003, "weight_decay": 0.3},
    ]


def train(model, optimizer, *, steps=STEPS, first=0, schedulers=(), end=lambda: None):
    """Train on data that depends on the step; the last layer is left out in every third step."""
    for index in range(first, first + steps):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        inputs = inputs.to(model[0].weight.dtype)
        optimizer.zero_grad()
        leaves_out = index % 3 == 2
        hidden = model[:4](inputs) if leaves_out else model(inputs)
        hidden.square().sum().backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        end()
    return dict(model.named_parameters())


def both(kind, make, **options):
    """Return a live optimizer with NAdam's steps, torch's NAdam, and their models."""
    model, other_model = network(), network()
    live = kind(make(model), **options)
    control = nesterov_control(live)
    wanted = of_another_class(kind(make(other_model), **options), NAdam, changes=control.optimizer)
    apply_control(control, model, live)
    return model, live, other_model, wanted


def assert_equal_training(model, live, other_model, wanted, **options):
    ends, others = train(model, live, **options), train(other_model, wanted, **options)
    for name, end in ends.items():
        torch.testing.assert_close(end, others[name], **CLOSE)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"maximize": True},
        {"weight_decay": 0.2, "eps": 1e-3},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_steps_are_those_of_torchs_nadam(kind, options):
    parts = both(kind, lambda model: model.parameters(), **{"lr": 0.01, **options})
    assert_equal_training(*parts)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_groups_keep_their_own_settings_and_frozen_parameters_stay(kind):
    parts = both(kind, grouped, lr=0.01, weight_decay=0.1)
    for model in (parts[0], parts[2]):
        model[2].bias.requires_grad_(False)
    frozen = parts[0][2].bias.detach().clone()
    assert_equal_training(*parts)
    assert torch.equal(parts[0][2].bias, frozen)


def test_schedulers_of_rate_and_momentum_act_on_the_steps():
    model, live, other_model, wanted = both(AdamW, grouped, lr=0.01)
    ends = []
    for one, optimizer in ((model, live), (other_model, wanted)):
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)
        ends.append(train(one, optimizer, schedulers=[cycle]))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name], **CLOSE)


def test_the_rule_is_the_one_that_is_written_down(reference):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # else the product is rounded to float32, as in torch
    try:
        for decoupled in (False, True):
            weight = nn.Parameter(torch.tensor([0.7]))
            rates = [0.1, 0.05, 0.2, 0.1]
            gradients = [0.4, -0.3, None, 2.0]
            options = {"betas": (0.85, 0.97), "eps": 1e-4, "weight_decay": 0.3}
            kind = AdamW if decoupled else Adam
            optimizer = kind([weight], maximize=True, **options)
            apply_control(nesterov_control(optimizer), nn.Linear(1, 1), optimizer)
            for gradient, rate in zip(gradients, rates, strict=True):
                weight.grad = None if gradient is None else torch.tensor([gradient])
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            wanted = reference.nadam(
                0.7,
                gradients,
                rates,
                momentum_decay=4e-3,
                decoupled=decoupled,
                maximize=True,
                **options,
            )
            assert weight.item() == pytest.approx(wanted, rel=1e-13)
    finally:
        torch.set_default_dtype(before)


def test_one_step_worked_out_by_hand():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW([weight], lr=0.1, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    # With no decay of the momentum every mu is 0.25, whose products float32 holds exactly.
    control = Control(name="nadam", optimizer_class=NAdam, optimizer={"momentum_decay": 0.0})
    apply_control(control, nn.Linear(1, 1), optimizer)
    weight.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    # m = 1, v = 2, its root corrected for the bias 2: g/root = 1, m/root = 1/2, so
    # 0.1 · (0.75/(1 - 0.25) · 1 + 0.25/(1 - 0.0625) · 1/2) = 0.1 · (1 + 2/15)
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + 2 / 15), rel=1e-14)


def test_the_decay_of_the_momentum_is_torchs_default():
    assert inspect.signature(NAdam).parameters["momentum_decay"].default == MOMENTUM_DECAY


def test_complex_parameters_take_nadams_step():
    ends = []
    for kind in (AdamW, NAdam):
        weight = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
        optimizer = kind([weight], lr=0.1, weight_decay=0.1)
        if kind is AdamW:
            apply_control(nesterov_control(optimizer), nn.Linear(1, 1), optimizer)
        else:
            optimizer.param_groups[0]["decoupled_weight_decay"] = True
        for _ in range(3):
            optimizer.zero_grad()
            (weight * weight.conj()).real.sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], **CLOSE)


def test_a_closure_computes_the_gradient_inside_the_step():
    model, live, other_model, wanted = both(AdamW, lambda model: model.parameters(), lr=0.02)
    for one, optimizer in ((model, live), (other_model, wanted)):

        def closure(one=one, optimizer=optimizer):
            optimizer.zero_grad()
            loss = one(torch.ones(2, 4, dtype=torch.float64)).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
    for one, other in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_no_step(fused):
    ends = []
    for kind in (AdamW, NAdam):
        model = network(torch.float32)
        options = {"fused": True} if fused and kind is AdamW else {}
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.01, **options)
        if kind is AdamW:
            apply_control(nesterov_control(optimizer), model, optimizer)
        else:
            optimizer.param_groups[0]["decoupled_weight_decay"] = True
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for index in range(5):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 4), 0.1 * index)).square().sum()).backward()
            if index == 2:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        ends.append(dict(model.named_parameters()))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_saved_and_loaded_optimizer_goes_on_exactly(tmp_path, dtype):
    ends = []
    for stops_after in (5, 12):
        model = network(dtype)
        optimizer = AdamW(grouped(model), lr=0.01)
        apply_control(nesterov_control(optimizer), model, optimizer)
        train(model, optimizer, steps=stops_after)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer")
        again = network(dtype)
        again.load_state_dict(model.state_dict())
        fresh = AdamW(grouped(again), lr=0.01)
        apply_control(nesterov_control(fresh), again, fresh)
        fresh.load_state_dict(torch.load(tmp_path / "optimizer"))
        ends.append(train(again, fresh, steps=12 - stops_after, first=stops_after))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_after_plain_steps_of_adam_it_goes_on_with_the_product_that_nadam_would_have():
    model, other_model = network(), network()
    live = AdamW(model.parameters(), lr=0.01)
    train(model, live, steps=4)
    other_model.load_state_dict(model.state_dict())
    wanted = NAdam(
        other_model.parameters(), lr=0.01, weight_decay=0.01, decoupled_weight_decay=True
    )
    for parameter, other in zip(model.parameters(), other_model.parameters(), strict=True):
        state = {key: value.clone() for key, value in live.state[parameter].items()}
        product = torch.ones(())
        for step in range(1, int(state["step"]) + 1):
            product *= 0.9 * (1 - 0.5 * 0.96 ** (step * 4e-3))
        wanted.state[other] = {**state, "mu_product": product}
    apply_control(nesterov_control(live), model, live)
    assert_equal_training(model, live, other_model, wanted, steps=4, first=4)


def test_a_step_without_a_gradient_counts_for_nothing():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight], lr=0.1)
    apply_control(nesterov_control(optimizer), nn.Linear(1, 1), optimizer)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable"])
def test_what_cannot_take_nadams_step_is_refused_in_words(option):
    model = network()
    optimizer = AdamW(model.parameters())
    optimizer.param_groups[0][option] = True
    control = Control(name="nadam", optimizer_class=NAdam)
    with pytest.raises(RegradError, match=f"{option} must be False for NAdam's steps"):
        apply_control(control, model, optimizer)
    assert "nesterov" not in optimizer.param_groups[0]


def test_a_subclass_is_refused():
    class Own(AdamW):
        pass

    with pytest.raises(RegradError, match=r"only torch's Adam and AdamW .* got Own"):
        check_can_be_nadam(Own(network().parameters()))


def test_corrections_that_look_ahead_are_refused_on_it():
    model = network()
    optimizer = AdamW(model.parameters())
    apply_control(nesterov_control(optimizer), model, optimizer)
    assert looks_ahead(optimizer)
    if "xgrad" in regrad.available():
        with pytest.raises(RegradError, match="would look ahead twice"):
            regrad.attach(model, optimizer, ["xgrad"])
