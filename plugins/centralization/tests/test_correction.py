"""What is centred, both placements on every optimizer that has coupled decay, and the loops that people have."""

import pytest
import regrad
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad import Correction
from regrad.correction import Needs
from regrad_centralization import Centralization
from regrad_centralization.functional import Unit
from regrad_centralization.units import unit_of, units_of
from torch import nn

SPECS = ["centralization", "centralization:placement=decayed"]
UPDATE = "centralization:placement=update"


def make_model(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def batches(count=5, size=32, dtype=torch.float64):
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


def sgd(model, **options):
    return torch.optim.SGD(
        model.parameters(), lr=0.5, momentum=0.9, **{"weight_decay": 0.1, **options}
    )


def train(model, corrections, *, make=sgd, parts=1, change=None, data=None):
    optimizer = make(model)
    with regrad.attach(model, optimizer, corrections) as attachment:
        for inputs, target in data or batches(dtype=next(model.parameters()).dtype):
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                (loss_of(model, x, y) / parts).backward()
            if change:
                change(model)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], attachment.metrics()


def centre_weights(reference, decay=0.0, sign=1.0):
    """Return what gives each gradient its decay and centres it, as a loop would; the optimizer then has no decay."""

    def change(model):
        for p in model.parameters():
            p.grad = sign * p.grad + decay * p.detach()
            if p.dim() > 1:
                p.grad = reference.centralize(p.grad, reference.outputs(nn.Linear(1, 1), p.shape))
            p.grad = sign * p.grad

    return change


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), Unit()),
    "linear of one output": (lambda: nn.Linear(3, 1), Unit()),
    "linear of one input": (lambda: nn.Linear(1, 4), None),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), Unit()),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), Unit()),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), Unit()),
    "conv of one channel": (lambda: nn.Conv2d(1, 4, 3), Unit()),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), Unit()),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), None),
    "depthwise with a multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4), None),
    "one weight per output": (lambda: nn.Conv2d(1, 4, 1), None),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), Unit(1)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), Unit(1, 2)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), None),
    "transposed, one weight per output": (lambda: nn.ConvTranspose2d(1, 4, 1), None),
    "embedding": (lambda: nn.Embedding(5, 3), None),
    "layer norm of an image": (lambda: nn.LayerNorm([3, 4, 4]), None),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_has_the_outputs_of_its_type(kind):
    make, expected = LAYERS[kind]
    layer = make()
    assert unit_of(layer, "weight", layer.weight) == expected
    convolution = expected if isinstance(layer, nn.modules.conv._ConvNd) else None
    assert unit_of(layer, "weight", layer.weight, conv_only=True) == convolution
    if getattr(layer, "bias", None) is not None:
        assert unit_of(layer, "bias", layer.bias) is None


def test_attention_recurrence_tokens_and_gains_by_hand():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    units = units_of(attention, conv_only=False)
    assert {name for name, unit in units.items() if unit} == {"in_proj_weight", "out_proj.weight"}
    assert {name for name, unit in units_of(nn.LSTM(3, 4), conv_only=False).items() if unit} == {
        "weight_ih_l0",
        "weight_hh_l0",
    }
    for shape in [(4, 1, 1), (1, 1, 8), (1, 5, 8), (1,)]:
        assert unit_of(nn.Module(), "own", torch.empty(shape)) is None
    assert unit_of(nn.Module(), "own", torch.empty(4, 3)) == Unit()


def test_a_head_tied_to_an_embedding_is_left_alone():
    model = nn.Module()
    model.head, model.table = nn.Linear(3, 5), nn.Embedding(5, 3)
    model.table.weight = model.head.weight
    assert units_of(model, conv_only=False) == {"head.weight": None, "head.bias": None}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_correction_centres_as_the_reference_does(kind, reference, generator):
    make, unit = LAYERS[kind]
    model = nn.Sequential(make()).double()
    expected = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected[name] = parameter.grad.clone()
    if unit:
        every = reference.outputs(model[0], model[0].weight.shape)
        expected["0.weight"] = reference.centralize(expected["0.weight"], every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, ["centralization"]) as attachment:
        attachment.engine.forwards = 1  # no forward is under test here
        optimizer.step()
        assert attachment.receipt()["corrections"][0]["matched"] == (["0.weight"] if unit else [])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-15)


OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "nesterov": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "sgd fused": lambda p, **o: torch.optim.SGD(p, lr=0.1, fused=True, **o),
    "sgd foreach": lambda p, **o: torch.optim.SGD(p, lr=0.1, foreach=True, **o),
    "sgd maximize": lambda p, **o: torch.optim.SGD(p, lr=0.01, maximize=True, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, **o),
    "adam maximize": lambda p, **o: torch.optim.Adam(p, lr=0.01, maximize=True, **o),
    "nadam": lambda p, **o: torch.optim.NAdam(p, lr=0.01, **o),
    "radam": lambda p, **o: torch.optim.RAdam(p, lr=0.01, **o),
    "adamax": lambda p, **o: torch.optim.Adamax(p, lr=0.01, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.01, **o),
    "adadelta": torch.optim.Adadelta,
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.01, **o),
    "asgd": lambda p, **o: torch.optim.ASGD(p, lr=0.1, **o),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decayed_is_the_optimizer_on_centred_gradient_and_decay(name, reference):
    make = lambda decay: lambda m: OPTIMIZERS[name](m.parameters(), weight_decay=decay)  # noqa: E731
    ours, _ = train(make_model(), ["centralization:placement=decayed"], make=make(0.3))
    sign = -1.0 if "maximize" in name else 1.0
    theirs, _ = train(make_model(), [], make=make(0.0), change=centre_weights(reference, 0.3, sign))
    for a, b in zip(ours, theirs, strict=True):
        # the equality of the gradients is 3e-15; adaptive steps divide by its size
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_decayed_gives_the_optimizer_what_is_centred_to_rounding(reference):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.3)
    with regrad.attach(model, optimizer, ["centralization:placement=decayed"]):
        loss_of(model, *batches()[0]).backward()
        raw = model[0].weight.grad + 0.3 * model[0].weight.detach()
        optimizer.step()
    seen = model[0].weight.grad + 0.3 * model[0].weight.detach()
    expected = reference.centralize(raw, reference.outputs(model[0], (10, 6)))
    torch.testing.assert_close(seen, expected, rtol=0, atol=3e-15)


def test_gradient_is_the_optimizer_on_the_centred_gradient(reference):
    ours, metrics = train(make_model(), ["centralization"])
    theirs, _ = train(make_model(), [], change=centre_weights(reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert metrics["centralization/gradient/trigger_rate"] == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.float64, 4e-16)])
def test_row_means_never_move_when_decay_is_centred_and_decay_otherwise(dtype, tolerance):
    ends = {}
    for placement in ("gradient", "decayed"):
        generator = torch.Generator().manual_seed(1)
        # 64 weights per output: each step rounds each of them, near 1, by up to 6e-8 in float32
        data = [
            (torch.randn(4, 64, generator=generator, dtype=dtype), torch.tensor([0, 1, 2, 1]))
            for _ in range(200)
        ]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
        with torch.no_grad():
            weight = model[0].weight
            weight += 1.01 - weight.mean(1, keepdim=True)
            start = weight.double().mean(1)
        make = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.05)  # noqa: E731
        train(model, [Centralization(placement=placement)], make=make, data=data)
        ends[placement] = weight.detach().double().mean(1)
    drift = (ends["decayed"] - start).abs().max().item()
    assert drift <= tolerance, drift
    # by hand: 1.01·(1 − .1·.05)^200 = .3706
    torch.testing.assert_close(
        ends["gradient"], torch.full((10,), 0.3706, dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 0.6058), (0.9, -0.0035)])
def test_row_means_decay_as_the_optimizer_decays_a_weight_without_a_gradient(momentum, expected):
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(4, 6, generator=generator).double(), torch.tensor([0, 1, 2, 1]))
        for _ in range(100)
    ]
    model = make_model()
    with torch.no_grad():
        weight = model[0].weight
        weight += 1 - weight.mean(1, keepdim=True)
    make = lambda m: torch.optim.SGD(  # noqa: E731
        m.parameters(), lr=0.05, weight_decay=0.1, momentum=momentum
    )
    train(model, ["centralization"], make=make, data=data)
    mean, velocity = 1.0, 0.0
    for _ in range(100):
        velocity = momentum * velocity + 0.1 * mean
        mean -= 0.05 * velocity
    assert mean == pytest.approx(expected, abs=5e-5)
    torch.testing.assert_close(
        weight.detach().mean(1), torch.full((10,), mean, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_step_of_adam_has_a_mean_again_though_its_gradients_have_none():
    model = make_model()
    before = model[0].weight.detach().mean(1)
    train(model, ["centralization"], make=lambda m: torch.optim.Adam(m.parameters(), lr=0.01))
    assert model[0].weight.grad.mean(1).abs().max() < 1e-15
    assert (model[0].weight.detach().mean(1) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    ],
    ids=["adam", "rmsprop", "nesterov"],
)
def test_centred_updates_never_move_a_mean_whatever_the_optimizer(make):
    model = make_model()
    weight = model[0].weight
    before = weight.detach().clone()
    train(model, [UPDATE], make=lambda m: make(m.parameters()))
    moved = weight.detach() - before
    assert moved.mean(1).abs().max() < 1e-15
    assert moved.abs().max() > 1e-3


def test_centred_updates_leave_means_to_decoupled_decay():
    model = make_model()
    before = model[0].weight.detach().mean(1)

    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)

    train(model, [UPDATE], make=make)
    after = model[0].weight.detach().mean(1)
    torch.testing.assert_close(after, before * (1 - 0.01 * 0.5) ** 5, rtol=0, atol=1e-15)


def test_a_centred_update_is_the_authors_step_of_adam(reference):
    """Their `gc_loc=False`: decay goes into the gradient, and the update is centred."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1)
    twin = make_model()
    other = torch.optim.Adam(twin.parameters(), lr=0.02, weight_decay=0.1)
    regrad.attach(model, optimizer, [UPDATE])
    for inputs, target in batches():
        for net, its_optimizer in ((model, optimizer), (twin, other)):
            its_optimizer.zero_grad()
            loss_of(net, inputs, target).backward()
        before = [p.detach().clone() for p in twin.parameters()]
        optimizer.step()
        other.step()
        with torch.no_grad():
            for parameter, old in zip(twin.parameters(), before, strict=True):
                step = parameter - old
                if step.dim() > 1:
                    units = reference.outputs(nn.Linear(1, 1), step.shape)
                    parameter.copy_(old + reference.centralize(step, units))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_under_sgd_a_centred_update_is_that_of_the_centred_and_decayed_gradient():
    ends = [train(make_model(), [spec])[0] for spec in (UPDATE, SPECS[1])]
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_bias_is_the_optimizers_to_the_bit_beside_centred_updates():
    models = []
    for specs in ([UPDATE], []):
        model = make_model()
        inputs, target = batches()[0]
        optimizer = sgd(model)
        with regrad.attach(model, optimizer, specs):
            loss_of(model, inputs, target).backward()
            optimizer.step()
        models.append(model)
    assert torch.equal(models[0][0].bias, models[1][0].bias)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_sparse_gradients_are_refused_beside_centred_updates():
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrad.attach(model, optimizer, [UPDATE])
    model(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(regrad.RegradError, match="must not see sparse gradients"):
        optimizer.step()


def test_updates_of_parameters_that_come_later_are_centred_too():
    model = make_model()
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [UPDATE]):
        for index, (inputs, target) in enumerate(batches()):
            if index == 1:
                model.append(nn.Linear(3, 3).double())
                late = [*model[0].parameters(), *model[3].parameters()]
                starts = {layer: layer.weight.detach().mean(1) for layer in (model[0], model[3])}
                optimizer.add_param_group({"params": late})
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
    for layer, start in starts.items():
        assert (layer.weight.detach().mean(1) - start).abs().max() < 1e-15


def test_without_decay_the_placements_are_the_same_to_the_bit():
    ends = [
        train(make_model(), [spec], make=lambda m: sgd(m, weight_decay=0.0))[0] for spec in SPECS
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Outsider(torch.optim.SGD):
    """An optimizer of another library."""


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.Adam(p, decoupled_weight_decay=True),
        lambda p: Outsider(p, lr=0.1),
        torch.optim.LBFGS,
    ],
)
def test_decayed_is_refused_where_the_decay_is_not_in_the_gradient(make):
    model = make_model()
    with pytest.raises(
        regrad.RegradError, match="decouples it or is unknown; use placement='gradient'"
    ):
        regrad.attach(model, make(model.parameters()), ["centralization:placement=decayed"])
    regrad.attach(model, make(model.parameters()), ["centralization"]).detach()


def test_a_group_that_turns_decoupled_is_refused_at_its_step():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    with regrad.attach(model, optimizer, ["centralization:placement=decayed"]):
        optimizer.param_groups[0]["decoupled_weight_decay"] = True
        loss_of(model, *batches()[0]).backward()
        with pytest.raises(regrad.RegradError, match="Adam decouples it"):
            optimizer.step()


# Where a graph breaks, dynamo itself looks at `.grad` of what crosses the break, and hides the warning by a log filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_a_model_compiled_after_attach_trains_as_the_plain_one(spec):
    plain, _ = train(make_model(), [spec])
    torch.compiler.reset()  # code compiled for another model of the class would run without this one's hooks
    model = make_model()
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [spec]):
        compiled = torch.compile(model, backend="eager")
        for inputs, target in batches():
            optimizer.zero_grad()
            loss_of(compiled, inputs, target).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))


def test_lbfgs_is_borne():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    means = model[0].weight.detach().mean(1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, *batches()[0])
        loss.backward()
        return loss

    with regrad.attach(model, optimizer, ["centralization"]):
        optimizer.step(closure)
    torch.testing.assert_close(model[0].weight.detach().mean(1), means, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_parameters_missing_and_zero_gradients_are_left_alone(spec):
    model = make_model()
    model[0].weight.requires_grad_(requires_grad=False)
    frozen = model[0].weight.clone()
    optimizer = sgd(model, weight_decay=0.0)
    with regrad.attach(model, optimizer, [spec]):
        model(torch.ones(2, 6, dtype=torch.float64))
        optimizer.step()
        model(torch.ones(2, 6, dtype=torch.float64)).sum().mul(0).backward()
        model[0].bias.grad = None
        optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None
    assert not model[2].weight.grad.any()


def test_sparse_gradients_of_embeddings_pass_through():
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["centralization"]):
        model(torch.tensor([1, 2])).square().sum().backward()
        before = model[0].weight.grad.to_dense().clone()
        optimizer.step()
    assert torch.equal(model[0].weight.grad.to_dense(), before)
    assert model[1].weight.grad.mean(1).abs().max() < 1e-6


def test_conv_only_leaves_linear_layers_alone():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["centralization:conv_only=true"]) as attachment:
        model(
            torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        ).square().sum().backward()
        before = model[2].weight.grad.clone()
        optimizer.step()
        assert attachment.receipt()["corrections"][0]["matched"] == ["0.weight"]
    assert torch.equal(model[2].weight.grad, before)
    assert model[0].weight.grad.mean((1, 2, 3)).abs().max() < 1e-6


def test_parameters_that_come_later_are_centred_too():
    model = make_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["centralization"]):
        for index, (inputs, target) in enumerate(batches()):
            if index == 1:
                model.append(nn.Linear(3, 3).double())
                optimizer.add_param_group(
                    {"params": [*model[0].parameters(), *model[3].parameters()]}
                )
            optimizer.zero_grad()
            loss_of(model, inputs, target).backward()
            optimizer.step()
    for layer in (model[0], model[2], model[3]):
        assert layer.weight.grad.mean(1).abs().max() < 1e-15


class Later(Correction):
    """Stands for a correction that centring must precede."""

    name = "gcw"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        """Do nothing."""


def test_centring_acts_before_gcw():
    model = make_model()
    with regrad.attach(model, sgd(model), [Later(), Centralization()]) as attachment:
        assert [c.name for c in attachment.corrections] == ["centralization", "gcw"]


def test_explain_shows_what_would_be_centred_and_changes_nothing():
    model = make_model()
    with regrad.attach(model, sgd(model), ["centralization"], nn.CrossEntropyLoss()) as attachment:
        rows = attachment.explain(batches()[0]).rows
        changed = {row["tensor"] for row in rows if row["relative_change"]}
    assert changed == {"0.weight", "2.weight"}
    assert all(p.grad is None for p in model.parameters())


def test_centring_has_no_state_and_a_resumed_run_continues_to_the_bit():
    whole, _ = train(make_model(), SPECS[1:])
    model = make_model()
    optimizer, state = sgd(model), None
    for part in (slice(0, 2), slice(2, 5)):
        with regrad.attach(model, optimizer, SPECS[1:]) as attachment:
            if state:
                attachment.load_state_dict(state)
            for inputs, target in batches()[part]:
                optimizer.zero_grad()
                loss_of(model, inputs, target).backward()
                optimizer.step()
            state = attachment.state_dict()
            assert not any(state["corrections"].values())
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))


def test_idle_reasons_name_the_probable_cause():
    model = make_model()
    with regrad.attach(model, sgd(model), [Centralization(conv_only=True)]) as attachment:
        reason = attachment.corrections[0].idle_reason()
    assert reason == "the model has no convolution with several weights per output"
    with regrad.attach(model, sgd(model), [Centralization()]) as attachment:
        assert attachment.corrections[0].idle_reason() == "the gradients' means were already zero"
    lone = nn.Sequential(nn.Linear(1, 3))
    with regrad.attach(lone, torch.optim.SGD(lone.parameters()), [Centralization()]) as attachment:
        assert (
            attachment.corrections[0].idle_reason()
            == "the model has no layer with several weights per output"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"placement": "decay"},
            r"placement must be Literal\['gradient', 'decayed', 'update'\], got 'decay'",
        ),
        ({"conv_only": 1}, "conv_only must be bool, got 1"),
        (
            {"convonly": True},
            "centralization has no option 'convonly'; allowed: placement, conv_only; did you mean",
        ),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        Centralization(**options)


@given(seed=st.integers(0, 50), decay=st.floats(0, 1))
def test_decayed_follows_the_reference_for_any_decay(seed, decay, reference):
    data = batches(2)
    ours, _ = train(
        make_model(seed=seed),
        [Centralization(placement="decayed")],
        make=lambda m: sgd(m, weight_decay=decay),
        data=data,
    )
    theirs, _ = train(
        make_model(seed=seed),
        [],
        make=lambda m: sgd(m, weight_decay=0.0),
        change=centre_weights(reference, decay),
        data=data,
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
