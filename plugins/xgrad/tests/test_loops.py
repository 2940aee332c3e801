"""Weight prediction in the loops that people have: scalers, accumulation, closures."""

import pytest
import regrad
import torch


def make_model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)
        ).to(dtype)


def batches(count=6, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model, inputs, target):
    return torch.nn.functional.cross_entropy(model(inputs), target)


def points_of(model):
    """Collect the first weight as every training forward sees it."""
    points = []
    model.register_forward_hook(lambda module, *_: points.append(module[0].weight.detach().clone()))
    return points


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_overflow_is_as_if_the_batch_had_not_been(kind, fused):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    plain, scaled = make_model(), make_model()
    make = lambda m: kind(m.parameters(), lr=0.05, fused=fused, **options)  # noqa: E731
    optimizer = make(plain)
    with regrad.attach(plain, optimizer, ["xgrad"]):
        for inputs, target in batches():
            optimizer.zero_grad()
            loss_of(plain, inputs, target).backward()
            optimizer.step()
    optimizer, scaler = make(scaled), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with regrad.attach(scaled, optimizer, ["xgrad"]):
        for index, (inputs, target) in enumerate(batches()):
            for overflow in (True, False) if index == 3 else (False,):
                optimizer.zero_grad()
                loss = loss_of(scaled, inputs, target) * (torch.inf if overflow else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    for a, b in zip(weights_of(plain), weights_of(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_four_parts_of_a_batch_are_the_batch(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    results = []
    for parts in (1, 4):
        model = make_model(torch.float64)
        points = points_of(model)
        optimizer = kind(model.parameters(), lr=0.05, **options)
        with regrad.attach(model, optimizer, ["xgrad"]) as attachment:
            for inputs, target in batches(dtype=torch.float64):
                optimizer.zero_grad()
                for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                    (loss_of(model, x, y) / parts).backward()
                optimizer.step()
            assert attachment.metrics()["steps_applied"] == 6
        results.append((weights_of(model), points[::parts]))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_closure_that_runs_forward_and_backward_inside_step_gives_the_numbers_of_the_plain_loop():
    plain, inside = make_model(), make_model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    with regrad.attach(plain, optimizer, ["xgrad"]):
        for inputs, target in batches():
            optimizer.zero_grad()
            loss_of(plain, inputs, target).backward()
            optimizer.step()
    optimizer = torch.optim.Adam(inside.parameters(), lr=0.01)
    with regrad.attach(inside, optimizer, ["xgrad"]):
        for inputs, target in batches():

            def closure(inputs=inputs, target=target):
                optimizer.zero_grad()
                loss = loss_of(inside, inputs, target)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(inside), strict=True)
    )


def test_a_scheduler_is_ahead_of_the_prediction():
    model = make_model(torch.float64)
    points = points_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.1)
    (inputs, target), *_ = batches(dtype=torch.float64)
    with regrad.attach(model, optimizer, ["xgrad"]):
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            if len(points) == 1:
                optimizer.step()
                scheduler.step()
                weight, buffer = (
                    weights_of(model)[0],
                    optimizer.state[model[0].weight]["momentum_buffer"].clone(),
                )
    # the rate of the coming step, 0.1, not that of the last, 1.0
    torch.testing.assert_close(points[1], weight - 0.1 * buffer, rtol=0, atol=1e-15)


def test_an_empty_group_or_a_fresh_parameter_is_no_obstacle():
    model = make_model()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    with regrad.attach(model, optimizer, ["xgrad"]):
        for index, (inputs, target) in enumerate(batches()):
            if index == 3:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.02})
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_corrections_effect_is_the_size_of_its_prediction():
    model = make_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (inputs, target), *_ = batches(dtype=torch.float64)
    with regrad.attach(model, optimizer, ["xgrad"]) as attachment:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
            if not attachment.metrics().get("xgrad/weights/trigger_rate"):
                moves = {p: 0.1 * optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
                sizes = [(p.norm() ** 2, move.norm() ** 2) for p, move in moves.items()]
        weight, moved = (sum(column) ** 0.5 for column in zip(*sizes, strict=True))
        assert attachment.metrics()["xgrad/weights/relative_change"] == pytest.approx(
            (moved / weight).item(), rel=1e-5
        )
