"""AdaNorm in the loops that people have: scalers, accumulation, closures."""

import pytest
import regrad
import torch


def make_model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)
        ).to(dtype)


def batches(count=9, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model, inputs, target, index):
    return (0.1 if index % 3 == 2 else 1.0) * torch.nn.functional.cross_entropy(
        model(inputs), target
    )


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def train(model, optimizer, spec="adanorm:decay=0.5", parts=1, dtype=torch.float32):
    with regrad.attach(model, optimizer, [spec]) as attachment:
        for index, (inputs, target) in enumerate(batches(dtype=dtype)):
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                (loss_of(model, x, y, index) / parts).backward()
            optimizer.step()
        assert attachment.metrics()["adanorm/largest_scale"] > 1
    return weights_of(model)


OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.05, weight_decay=0.01, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.05, **o),
}


@pytest.mark.parametrize("target", ["moment", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_is_as_if_the_batch_had_not_been(kind, fused, target):
    spec = f"adanorm:decay=0.5,target={target}"
    plain, scaled = make_model(), make_model()
    expected = train(plain, OPTIMIZERS[kind](plain.parameters(), fused=fused), spec)
    optimizer = OPTIMIZERS[kind](scaled.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with regrad.attach(scaled, optimizer, [spec]) as attachment:
        for index, (inputs, labels) in enumerate(batches()):
            for overflow in (True, False) if index == 3 else (False,):
                optimizer.zero_grad()
                loss = loss_of(scaled, inputs, labels, index) * (torch.inf if overflow else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert attachment.metrics()["steps_applied"] == 9
    for a, b in zip(expected, weights_of(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["moment", "gradient"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_four_parts_of_a_batch_are_the_batch(kind, target):
    results = []
    for parts in (1, 4):
        model = make_model(torch.float64)
        optimizer = OPTIMIZERS[kind](model.parameters())
        results.append(
            train(model, optimizer, f"adanorm:decay=0.5,target={target}", parts, torch.float64)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure_that_runs_forward_and_backward_inside_step_gives_the_numbers_of_the_plain_loop(
    kind,
):
    plain, inside = make_model(), make_model()
    expected = train(plain, OPTIMIZERS[kind](plain.parameters()))
    optimizer = OPTIMIZERS[kind](inside.parameters())
    with regrad.attach(inside, optimizer, ["adanorm:decay=0.5"]):
        for index, (inputs, target) in enumerate(batches()):

            def closure(inputs=inputs, target=target, index=index):
                optimizer.zero_grad()
                loss = loss_of(inside, inputs, target, index)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(expected, weights_of(inside), strict=True))


def test_an_optimizer_that_evaluates_its_closure_again_is_refused():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    inputs, target = batches()[0]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, target, 0)
        loss.backward()
        return loss

    with pytest.raises(regrad.RegradError, match="adanorm"):  # noqa: SIM117
        with regrad.attach(model, optimizer, ["adanorm:target=gradient"]):
            optimizer.step(closure)


def test_a_bfloat16_autocast_loop_stays_near_the_float32_one():
    plain, cast = make_model(), make_model()
    expected = train(plain, OPTIMIZERS["sgd"](plain.parameters()))
    optimizer = OPTIMIZERS["sgd"](cast.parameters())
    with regrad.attach(cast, optimizer, ["adanorm:decay=0.5"]):
        for index, (inputs, target) in enumerate(batches()):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(cast, inputs, target, index)
            loss.backward()
            optimizer.step()
    for a, b in zip(expected, weights_of(cast), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)  # bf16 keeps 8 bits


def test_the_same_correction_works_on_two_dtypes_at_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2).double()})
    model.forward = lambda scale: (
        scale * (model["a"].weight.sum() + model["b"].weight.sum().float())
    )
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if "weight" in n], weight_decay=0.1
    )
    with regrad.attach(model, optimizer, ["adanorm:decay=0.5"]) as attachment:
        for scale in (2.0, 1.0):
            optimizer.zero_grad()
            model(scale).backward()
            optimizer.step()
        averages = attachment.state_dict()["corrections"]["adanorm"]["averages"]
    assert {name: e.dtype for name, e in averages.items()} == {
        "a.weight": torch.float32,
        "b.weight": torch.float64,
    }
