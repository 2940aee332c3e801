"""The offset in the loops that people have: scalers, accumulation, closures, new groups, clipping."""

from contextlib import nullcontext

import pytest
import regrad
import torch
from regrad_gcw import GCW
from regrad_testing import no_waiting

KINDS = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
OPTIONS = {"layers": "all", "warmup_steps": 1, "fit_every": 2}


def make_model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            torch.nn.Linear(6, 10),
            torch.nn.GroupNorm(2, 10),
            torch.nn.Tanh(),
            torch.nn.Linear(10, 3),
        )
        return torch.nn.Sequential(*layers).to(dtype)


def batches(count=9, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def stacked(kept):
    return torch.stack([*kept["history"].values()])


def loss_of(model, inputs, target):
    return torch.nn.functional.cross_entropy(model(inputs), target)


def assert_same_weights(one, other, **tolerance):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_overflow_is_as_if_the_batch_had_not_been(kind, options, fused):
    plain, scaled = make_model(), make_model()
    overflows = (
        (3,) if kind is torch.optim.SGD and fused else (0, 3)
    )  # in its first step torch's own buffer is garbage
    states = []
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        optimizer = kind(model.parameters(), lr=0.05, fused=fused, **options)
        with regrad.attach(model, optimizer, [GCW(**OPTIONS)]) as attachment:
            for index, (inputs, target) in enumerate(batches()):
                for overflow in (True, False) if scaler and index in overflows else (False,):
                    optimizer.zero_grad()
                    loss = loss_of(model, inputs, target) * (torch.inf if overflow else 1.0)
                    if scaler:
                        scaler.scale(loss).backward()
                        if not fused:
                            scaler.unscale_(optimizer)
                        scaler.step(optimizer)
                        scaler.update()
                    else:
                        loss.backward()
                        optimizer.step()
            states.append(attachment.state_dict()["corrections"]["gcw"])
    assert_same_weights(plain, scaled, rtol=1e-5, atol=1e-6)
    for name, kept in states[0].items():
        assert (kept["seen"], kept["rows"]) == (states[1][name]["seen"], states[1][name]["rows"])
        torch.testing.assert_close(stacked(kept), stacked(states[1][name]), rtol=1e-4, atol=1e-6)


def test_several_closure_calls_per_step_are_refused():
    model = make_model()
    with pytest.raises(
        regrad.RegradError, match="'gcw' must see one closure call; LBFGS makes several"
    ):
        regrad.attach(model, torch.optim.LBFGS(model.parameters()), [GCW(layers="all")])


def test_a_group_that_comes_later_starts_its_own_history():
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01, momentum=0.9)
    with regrad.attach(model, optimizer, [GCW(**OPTIONS)]) as attachment:
        for index, (inputs, target) in enumerate(batches()):
            if index == 4:
                optimizer.add_param_group({"params": list(model[3].parameters()), "momentum": 0.5})
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
        state = attachment.state_dict()["corrections"]["gcw"]
    assert {name: kept["seen"] for name, kept in state.items()} == {
        "0.weight": 9,
        "0.bias": 9,
        "3.weight": 5,
        "3.bias": 5,
    }


def test_an_autocast_around_the_step_changes_no_number():
    models = []
    for enabled in (True, False):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with regrad.attach(model, optimizer, [GCW(**OPTIONS, predictor="attention")]):
            for inputs, target in batches():
                optimizer.zero_grad()
                loss_of(model, inputs, target).backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    optimizer.step()
        models.append(model)
    assert_same_weights(*models)


def test_channels_last_gradients_give_the_numbers_of_contiguous_ones():
    models = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Conv2d(3, 4, 3).double().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        with regrad.attach(model, optimizer, [GCW(**OPTIONS)]):
            for _ in range(9):
                images = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).to(
                    memory_format=layout
                )
                optimizer.zero_grad()
                model(images).square().sum().backward()
                optimizer.step()
        models.append(model)
    assert_same_weights(*models, rtol=0, atol=1e-12)


def test_explain_shows_the_offset_and_changes_nothing():
    model, data = make_model(), batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = torch.nn.CrossEntropyLoss()
    with regrad.attach(model, optimizer, [GCW(**OPTIONS)], criterion) as attachment:
        for inputs, target in data[:4]:
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
        before = attachment.state_dict()["corrections"]["gcw"]
        rows = attachment.explain(data[4]).rows
        after = attachment.state_dict()["corrections"]["gcw"]
    assert {row["tensor"] for row in rows if row["relative_change"] > 0} == set(before)
    for name, kept in before.items():
        assert torch.equal(stacked(kept), stacked(after[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("predictor", ["slot", "attention"])
def test_a_gpu_trains_to_the_weights_of_the_cpu_without_waiting(kind, options, predictor):
    models = []
    for device in ("cpu", "cuda"):
        model = make_model(torch.float64).to(device)
        optimizer = kind(model.parameters(), lr=0.05, **options)
        with regrad.attach(
            model, optimizer, [GCW(layers="all", warmup_steps=0, predictor=predictor)]
        ):
            for index, (inputs, target) in enumerate(batches(30, dtype=torch.float64)):
                optimizer.zero_grad()
                loss_of(model, inputs.to(device), target.to(device)).backward()
                fits = index % 10 == 0 or index == 1
                with nullcontext() if fits else no_waiting():
                    optimizer.step()
        models.append(model.cpu())
    assert_same_weights(*models, rtol=1e-9, atol=1e-11)
