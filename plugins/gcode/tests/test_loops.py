"""The branches in the loops that people have: checkpoints, accumulation, autocast, scalers, closures, layouts."""

import copy
import itertools

import pytest
import regrad
import torch
from regrad_gcode import GCODE
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

loss_of = nn.functional.cross_entropy
STRONG = {"weight": 0.5, "warmup_steps": 1, "fit_every": 2}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(model, batches, parts=1, **options):
    optimizer, correction = sgd(model), GCODE(**{**STRONG, **options})
    with regrad.attach(model, optimizer, [correction]):
        for inputs, target in batches:
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                (loss_of(model(x), y) / parts).backward()
            optimizer.step()
    return correction


def assert_same(one, other, **tolerance):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def branches_of(correction):
    return {
        (n, key): value
        for n, kept in correction.state_dict().items()
        for key, value in kept["branch"].items()
    }


class Checkpointed(nn.Module):
    """The network with parts that run again in backward."""

    def __init__(self, network, parts, reentrant):
        super().__init__()
        self.network, self.parts, self.reentrant = network, parts, reentrant

    def call(self, function, x):
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x):
        net = self.network
        x = torch.tanh(net.stem(x))
        if self.parts == "stages":
            x = self.call(net.layer2, self.call(net.layer1, x))
        elif self.parts == "both":
            x = self.call(lambda h: net.layer2(net.layer1(h)), x)
        elif self.parts == "last":
            x = self.call(net.layer2, net.layer1(x))
        else:
            x = self.call(
                lambda h: torch.tanh(net.layer2(net.layer1(torch.tanh(h)))), torch.atanh(x)
            )
            x = torch.atanh(x)
        return net.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("parts", ["stages", "both", "last", "more"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_both_kinds_give_the_numbers_without(
    reentrant, parts, early, make_network, make_batches
):
    batches = make_batches(6)
    plain = make_network()
    expected = train(plain, batches)
    model = Checkpointed(make_network(), parts, reentrant)
    if parts == "more":  # the same rounding on both sides
        plain = make_network()
        other = Checkpointed(plain, parts, reentrant)
        other.call = lambda function, x: function(x)
        expected = train(other, batches)
    with set_checkpoint_early_stop(early):
        got = train(model, batches)
    assert_same(model.network, plain)
    for (_, value), (_, wanted) in zip(
        branches_of(got).items(), branches_of(expected).items(), strict=True
    ):
        assert torch.equal(value, wanted)


def test_running_a_stage_again_in_backward_is_no_later_forward_to_fit_to(
    make_network, make_batches
):
    results = []
    for wrap in (
        lambda network: network,
        lambda network: Checkpointed(network, "stages", reentrant=False),
    ):
        network = make_network()
        model, optimizer, correction = wrap(network), sgd(network), GCODE(**STRONG)
        with regrad.attach(model, optimizer, [correction]):
            for inputs, target in make_batches(5):
                optimizer.zero_grad()
                parts = zip(inputs.split(4), target.split(4), strict=True)
                with set_checkpoint_early_stop(False):
                    sum(
                        [loss_of(model(x), y) for x, y in parts]
                    ).backward()  # both forwards before any backward
                optimizer.step()
        results.append([*branches_of(correction).values(), *network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_stage_that_ends_in_a_view_may_run_again_in_backward(make_network, make_batches):
    class Viewed(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x.view(x.shape)

    results = []
    for again in (False, True):
        network = make_network()
        network.layer1, network.layer2 = Viewed(network.layer1), Viewed(network.layer2)
        model = Checkpointed(network, "stages", reentrant=False)
        if not again:
            model.call = lambda function, x: function(x)
        with set_checkpoint_early_stop(False):
            train(model, make_batches(4))
        results.append(network)
    assert_same(*results)


def test_a_checkpoint_that_cuts_through_a_stage_is_right_or_refused(make_batches):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            shapes = [(2, 4, 1), (4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1)]
            layers = [nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in shapes]
            return nn.Sequential(
                *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
            ).double()

    class Cut(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.net, self.reentrant = make(), reentrant

        def forward(self, x):
            x = self.net[:2](x)  # stages are 1..2 and 3..4
            x = checkpoint(self.net[2:4], x, use_reentrant=self.reentrant)
            return self.net[4:](x)

    batches, plain = make_batches(5), make()
    train(plain, batches)
    right = Cut(reentrant=False)
    train(right, batches)
    assert_same(right.net, plain)
    with pytest.raises(
        regrad.RegradError,
        match="'gcode' must see whole stages; checkpoint them whole, or with use_re",
    ):
        train(Cut(reentrant=True), batches)


def test_a_graph_kept_for_a_second_backward_injects_in_both(make_network, make_batches):
    model, (inputs, target) = make_network(), make_batches(1)[0]
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(**STRONG)]):
        loss_of(model(inputs), target).backward()
        optimizer.step()
        wrapped = Checkpointed(model, "stages", reentrant=False)
        for called in (model, wrapped):
            loss = loss_of(called(inputs), target)
            first, second = (
                torch.autograd.grad(loss, [*model.parameters()], retain_graph=again)
                for again in (True, False)
            )
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Siamese(nn.Module):
    """Runs its stages twice per forward, on two inputs or on the same tensor."""

    def __init__(self, network, same):
        super().__init__()
        self.network, self.same = network, same

    def forward(self, x):
        net = self.network
        one = torch.tanh(net.stem(x))
        other = one if self.same else torch.tanh(net.stem(x.flip(3)))
        return sum(net.head(net.layer2(net.layer1(part)).mean(dim=(2, 3))) for part in (one, other))


@pytest.mark.parametrize("same", [True, False])
def test_stages_shared_within_a_forward_inject_once_per_call(same, make_network, make_batches):
    model, (inputs, target) = Siamese(make_network(), same), make_batches(1)[0]
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(**STRONG)]):
        loss_of(model(inputs), target).backward()
        optimizer.step()
        got = torch.autograd.grad(loss_of(model(inputs), target), [*model.parameters()])
        # the same sum as one batch of both parts, whose stages run once
        both = torch.cat([inputs, inputs if same else inputs.flip(3)])
        net = model.network
        logits = net.head(net.layer2(net.layer1(torch.tanh(net.stem(both)))).mean(dim=(2, 3)))
        expected = torch.autograd.grad(loss_of(sum(logits.chunk(2)), target), [*model.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"fit_every": 1000}, {}, {"norm": "keep"}, {"flow": "scale"}], ids=str
)
def test_four_parts_of_a_batch_are_the_batch_and_fits_see_all_of_them(
    options, make_network, make_batches
):
    models, branches = [], []
    for parts in (1, 4):
        model = make_network()
        branches.append(branches_of(train(model, make_batches(6, size=32), parts, **options)))
        models.append(model)
    assert_same(*models, rtol=0, atol=1e-12)
    for key, value in branches[0].items():
        torch.testing.assert_close(branches[1][key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_a_fit_counts_rows_and_not_parts(together, make_network, make_batches):
    (inputs, target), branches = make_batches(1)[0], []
    for sizes in ([8], [5, 1, 2]):
        model = make_network()
        optimizer, correction = torch.optim.SGD(model.parameters(), lr=0.0), GCODE(fit_every=2)
        with regrad.attach(model, optimizer, [correction]):
            for _ in range(4):
                optimizer.zero_grad()
                parts = zip(inputs.split(sizes), target.split(sizes), strict=True)
                losses = (loss_of(model(x), y, reduction="sum") for x, y in parts)
                for loss in (
                    [sum(losses)] if together else losses
                ):  # one backward for all forwards, or one each
                    loss.backward()
                optimizer.step()
        branches.append(branches_of(correction))
    for key, value in branches[0].items():
        torch.testing.assert_close(branches[1][key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_is_as_if_the_batch_had_not_been_and_the_scale_is_transparent(
    fused, make_network, make_batches
):
    models, states = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = make_network(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        correction = GCODE(**STRONG)
        with regrad.attach(model, optimizer, [correction]) as attachment:
            for index, (inputs, target) in enumerate(make_batches(7, dtype=torch.float32)):
                for overflow in (True, False) if scaler and index in (1, 3) else (False,):
                    x = inputs + 1 if overflow else inputs
                    loss = loss_of(model(x), target) * (torch.inf if overflow else 1.0)
                    optimizer.zero_grad(set_to_none=fused)  # after the forward, as Lightning does
                    if scaler:
                        scaler.scale(loss).backward()
                        if not fused:
                            scaler.unscale_(optimizer)
                        scaler.step(optimizer)
                        scaler.update()
                    else:
                        loss.backward()
                        optimizer.step()
            assert attachment.metrics()["gcode/hidden/non_finite"] == 0
            assert attachment.metrics()["gcode/hidden/relative_change"] > 0
        models.append(model)
        states.append(branches_of(correction))
    assert_same(*models, rtol=1e-5, atol=1e-6)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-6)


def test_under_autocast_the_branch_stays_in_float32_and_the_numbers_come_near(
    make_network, make_batches
):
    models = []
    for enabled in (True, False):
        model = make_network(torch.float32)
        optimizer, correction = sgd(model), GCODE(**STRONG)
        with regrad.attach(model, optimizer, [correction]):
            for inputs, target in make_batches(6, dtype=torch.float32):
                optimizer.zero_grad()
                with torch.autocast(
                    "cpu", torch.bfloat16, enabled=enabled
                ):  # forward, backward and step inside
                    loss_of(model(inputs).float(), target).backward()
                    optimizer.step()
        assert {value.dtype for value in branches_of(correction).values()} == {torch.float32}
        models.append((model, branches_of(correction)))
    assert_same(models[0][0], models[1][0], rtol=0, atol=2e-2)
    for key, value in models[0][1].items():
        torch.testing.assert_close(value, models[1][1][key], rtol=0, atol=1e-2)


def test_an_autocast_around_the_step_changes_no_number(make_network, make_batches):
    models = []
    for enabled in (True, False):
        model = make_network(torch.float32)
        optimizer = sgd(model)
        with regrad.attach(model, optimizer, [GCODE(**STRONG)]):
            for inputs, target in make_batches(6, dtype=torch.float32):
                optimizer.zero_grad()
                loss_of(model(inputs), target).backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    optimizer.step()
        models.append(model)
    assert_same(*models)


def test_a_network_in_bf16_has_branches_in_float32(make_network, make_batches):
    model = make_network(torch.bfloat16)
    correction = train(model, make_batches(4, dtype=torch.bfloat16))
    assert {value.dtype for value in branches_of(correction).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_closure_gives_the_numbers_of_the_plain_loop_and_several_calls_are_refused(
    make_network, make_batches
):
    batches = make_batches(6)
    plain, inside = make_network(), make_network()
    train(plain, batches)
    optimizer = sgd(inside)
    with regrad.attach(inside, optimizer, [GCODE(**STRONG)]):
        for inputs, target in batches:

            def closure(inputs=inputs, target=target):
                optimizer.zero_grad()
                loss = loss_of(inside(inputs), target)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same(plain, inside)
    with pytest.raises(
        regrad.RegradError, match="'gcode' must see one closure call; LBFGS makes several"
    ):
        regrad.attach(plain, torch.optim.LBFGS(plain.parameters()), [GCODE()])


def test_channels_last_gives_the_numbers_of_contiguous_images(make_network, make_batches):
    models = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = make_network().to(memory_format=layout)
        batches = [(inputs.to(memory_format=layout), target) for inputs, target in make_batches(6)]
        models.append((model, branches_of(train(model, batches))))
    assert_same(models[0][0], models[1][0], rtol=0, atol=1e-12)
    for key, value in models[0][1].items():
        torch.testing.assert_close(
            value, models[1][1][key], rtol=0, atol=1e-10
        )  # Adam divides by small numbers


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_the_adjoint_trains_without_gradients_in_the_field(solver, make_network, make_batches):
    plain, model, batches = make_network(), make_network(), make_batches(4)
    train(plain, batches, solver=solver)
    correction = train(model, batches, solver=solver, adjoint=True)
    assert all(
        p.grad is None for pair in correction._pairs.values() for p in pair.branch.parameters()
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_a_frozen_stem_and_a_frozen_stage_train_the_rest(make_network, make_batches):
    model = make_network()
    for parameter in itertools.chain(model.stem.parameters(), model.layer1.parameters()):
        parameter.requires_grad_(False)
    before = copy.deepcopy(model)
    train(model, make_batches(5))
    assert_same(model.layer1, before.layer1)
    with pytest.raises(AssertionError):
        assert_same(model.head, before.head)


def test_a_loss_that_leaves_out_the_last_stage_adds_nothing_there(make_network, make_batches):
    model, (inputs, _) = make_network(), make_batches(1)[0]
    optimizer, kept = sgd(model), {}
    model.layer1.register_forward_hook(lambda module, arguments, output: kept.update(hidden=output))
    with regrad.attach(model, optimizer, [GCODE(**STRONG)]):
        for _ in range(2):
            optimizer.zero_grad()
            model(inputs)
            kept["hidden"].square().mean().backward(inputs=[*model.stem.parameters()])
            optimizer.step()
        got = model.stem.weight.grad.clone()
    assert got.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"norm": "keep"}, {"flow": "scale"}, {"solver": "dopri5"}], ids=str
)
def test_a_gpu_trains_to_the_weights_of_the_cpu(options, make_network, make_batches):
    models = []
    for device in ("cpu", "cuda"):
        model = make_network().to(device)
        state = torch.cuda.get_rng_state()
        train(
            model,
            [(inputs.to(device), target.to(device)) for inputs, target in make_batches(8)],
            **options,
        )
        assert torch.equal(torch.cuda.get_rng_state(), state)
        models.append(model.cpu())
    assert_same(*models, rtol=1e-9, atol=1e-9)
