import json
import math
from itertools import pairwise

import pytest
import regrad
import torch
from regrad_adafisher import AdaFisher
from torch import nn
from torch.nn import functional

ORACLE = {
    "linear": {
        "losses": (0.44952887123455504, 3.6420305621214277, 39.69712098996742),
        "states": (
            {"0": ((0.08, 0.087999996, 0.08, 0.081999999), (0.08, 0.08))},
            {"0": ((0.0064, 0.01503999568, 0.0064, 0.00855999892), (0.0064, 0.0064))},
        ),
        "weights": (
            (
                *(1.2881143923710996, -0.9949746184220746, 3.9799811011807926),
                *(-0.7985114736754609, 1.312307869573302, -3.9841643040674075),
            ),
            (29.803936490719266,),
            (48.52941502268702,),
        ),
    },
    "convolutional": {
        "losses": (0.7375040985095758, 1.8491850897097997, 19.542072701250458),
        "states": (
            {
                "0": (
                    (0.087628122462, 0.08, 0.087999924892, 0.08096983559),
                    (0.087994718619, 0.08),
                ),
                "1": ((0.08, 0.087999984), (0.087981850791, 0.08)),
            },
        ),
        "weights": (
            (),
            (),
            (
                *(9.0011799896, -6.7162211221, -10.0363972141, 5.0283280268),
                *(-0.1753916138, -0.4357878862, -0.4912263063, -0.3156333189),
            ),
        ),
    },
}
NETWORKS = ("linear", "convolutional")


def network(reference, name):
    return getattr(reference, f"{name}_network")()


def require_known(found, wanted, rel):
    assert found[: len(wanted)] == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_gives_the_known_numbers_of_three_steps(name, reference):
    model, loss_of = network(reference, name)
    optimizer = reference.AdaFisher(model)
    for index in range(3):
        assert optimizer.step(loss_of) == pytest.approx(ORACLE[name]["losses"][index], rel=1e-10)
        for layer, (inputs, outputs) in (
            dict(enumerate(ORACLE[name]["states"])).get(index, {}).items()
        ):
            assert optimizer.fisher.inputs[layer] == pytest.approx(inputs, rel=1e-8)
            assert optimizer.fisher.outputs[layer] == pytest.approx(outputs, rel=1e-8)
        weights = next(model.parameters()).flatten().tolist()
        require_known(weights, ORACLE[name]["weights"][index], 1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_averages_and_gradients_on_its_way_are_the_known_ones(name, reference):
    """The weights go the way of the published optimizer; ours sees the same batches there."""
    theirs, loss_of = network(reference, name)
    published = reference.AdaFisher(theirs)
    ours, _ = network(reference, name)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    with regrad.attach(ours, optimizer, [AdaFisher(refresh=1)]) as attachment:
        for index in range(3):
            ours.load_state_dict(theirs.state_dict())
            optimizer.zero_grad()
            loss = loss_of(ours)
            loss.backward()
            raw = {key: parameter.grad.clone() for key, parameter in ours.named_parameters()}
            optimizer.step()
            published.step(loss_of)
            assert loss.item() == pytest.approx(ORACLE[name]["losses"][index], rel=1e-10)
            state = attachment.state_dict()["corrections"]["adafisher"]
            for layer, known in dict(enumerate(ORACLE[name]["states"])).get(index, {}).items():
                assert state[layer]["inputs"].tolist() == pytest.approx(known[0], rel=1e-8)
                assert state[layer]["outputs"].tolist() == pytest.approx(known[1], rel=1e-8)
            for key, parameter in ours.named_parameters():
                where, _, attribute = key.rpartition(".")
                divisor = published.fisher.divisor(
                    where, attribute, ours.get_submodule(where), parameter
                )
                wanted = 1e-3 * raw[key] / divisor
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-15)


def test_the_first_divisor_is_the_known_one(reference):
    model, loss_of = network(reference, "linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=1)]):
        loss_of(model).backward()
        raw = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    divisors = [
        1e-3 * before / parameter.grad
        for before, parameter in zip(raw, model.parameters(), strict=True)
    ]
    assert divisors[0][0, 0].item() == pytest.approx(0.0074, rel=1e-10)
    assert divisors[0][:, 1].tolist() == pytest.approx([0.00803999968] * 2, rel=1e-10)
    assert divisors[1].tolist() == pytest.approx([0.00755999992] * 2, rel=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_on_sgd_is_the_known_one(name, reference):
    """SGD with momentum at η(1−β)/((1−βᵗ)λ): at t = 1 that is η/λ."""
    theirs, loss_of = network(reference, name)
    reference.AdaFisher(theirs).step(loss_of)
    ours, _ = network(reference, name)
    optimizer = torch.optim.SGD(ours.parameters(), lr=100.0, momentum=0.9)
    with regrad.attach(ours, optimizer, [AdaFisher(refresh=1)]):
        loss_of(ours).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    if name == "linear":
        wanted = ORACLE[name]["weights"][0]
        assert ours[0].weight.flatten().tolist() == pytest.approx(wanted, rel=1e-10)
        assert ours[0].bias.tolist() == pytest.approx((-2.4277175441253407, 2.327717544128384))


def publish(reference, refresh, steps, rate=1e-4):
    """Train with the published optimizer and with ours on SGD, and return both models."""
    theirs, loss_of = reference.convolutional_network()
    published = reference.AdaFisher(theirs, rate=rate, refresh=refresh)
    ours, _ = reference.convolutional_network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, momentum=0.9)
    with regrad.attach(ours, optimizer, [AdaFisher(refresh=refresh)]):
        for index in range(1, steps + 1):
            published.step(loss_of)
            optimizer.param_groups[0]["lr"] = rate * 0.1 / ((1 - 0.9**index) * 1e-3)
            optimizer.zero_grad()
            loss_of(ours).backward()
            optimizer.step()
    return theirs, ours


def farthest(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_with_a_constant_divisor_it_is_the_published_optimizer(reference):
    """F = const is SGD with momentum at η(1−β)/((1−βᵗ)F): between two refreshes ours is theirs."""
    start, _ = reference.convolutional_network()
    theirs, ours = publish(reference, refresh=100, steps=60)
    assert farthest(theirs, start) > 0.01
    assert farthest(theirs, ours) < 1e-12


def test_at_a_refresh_it_differs_by_what_is_in_the_momentum(reference):
    theirs, ours = publish(reference, refresh=5, steps=12)
    assert farthest(theirs, ours) > 1e-4


def test_the_identity_with_sgd_with_momentum(reference):
    """The published rule with F replaced by a constant, against torch's SGD with momentum."""

    class Constant(reference.Fisher):
        def refresh(self, *_):
            pass

        def divisor(self, name, attribute, module, like):
            return torch.full_like(like, 0.0078).detach()

    theirs, loss_of = reference.convolutional_network()
    published = reference.AdaFisher(theirs, rate=1e-3)
    published.fisher = Constant()
    ours, _ = reference.convolutional_network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, momentum=0.9)
    for index in range(1, 301):
        published.step(loss_of)
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.1 / ((1 - 0.9**index) * 0.0078)
        optimizer.zero_grad()
        loss_of(ours).backward()
        optimizer.step()
    assert farthest(theirs, ours) < 1e-11


class Text(nn.Module):
    """What most models have: an embedding, attention, a tied head, and something not called."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        hidden = self.table(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.mlp(self.norm(hidden)))


def text_step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (3, 5), generator=generator)
    optimizer.zero_grad()
    functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    raw = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return raw


def make_text():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Text().double()


def test_parameters_are_found_by_identity_and_the_others_are_left_alone_and_listed():
    """The authors walk over parameters and modules in step: an embedding shifts them all."""
    model = make_text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=1)]) as attachment:
        raw = text_step(model, optimizer)
        changed = {
            key
            for key, parameter in model.named_parameters()
            if key in raw and not torch.equal(parameter.grad, raw[key])
        }
        receipt = attachment.receipt()
    ours = {
        f"{layer}.{kind}" for layer in ("norm", "mlp.0", "mlp.2") for kind in ("weight", "bias")
    }
    assert changed == {*ours, "head.bias"}
    never = {"spare.weight", "spare.bias", "attention.out_proj.weight", "attention.out_proj.bias"}
    assert {*receipt["corrections"][0]["matched"]} == changed | never
    notes = "\n".join(receipt["notes"])
    assert "leaves alone shared by several modules: table.weight; " in notes
    assert "MultiheadAttention: attention.in_proj_weight, attention.in_proj_bias" in notes
    assert "saw no call of attention.out_proj, spare, and leaves them alone" in notes
    assert json.loads(json.dumps(receipt)) == receipt


def test_a_module_that_is_called_twice_has_the_rows_of_both_calls(reference):
    model = nn.Linear(3, 3).double()
    first = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, [AdaFisher(average="ema")]) as attachment:
        second = torch.tanh(model(first)).detach()
        between = model(first)
        end = model(second)
        (between.square().sum() + end.square().sum()).backward()
        optimizer.step()
        state = attachment.state_dict()["corrections"]["adafisher"][""]
    h = torch.cat([first, second])
    s = 2 * torch.cat([between, end]).detach()
    inputs, outputs = reference.linear_moments(model, h, s)
    wanted = reference.min_max(inputs, relative=True)
    assert state["inputs"].tolist() == pytest.approx(wanted, rel=1e-10)
    assert state["outputs"].tolist() == pytest.approx(
        reference.min_max(outputs, relative=True), rel=1e-10
    )


def make_linear(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def linear_step(model, optimizer, index=0):
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), torch.tensor([0, 1] * 3)).backward()
    optimizer.step()


def test_averages_move_only_every_so_many_steps():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=3)]) as attachment:
        seen = []
        for index in range(7):
            linear_step(model, optimizer, index)
            seen.append(attachment.state_dict()["corrections"]["adafisher"]["0"]["outputs"])
    changes = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


def test_selected_modules_alone_are_divided():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["adafisher:select=[2]"]) as attachment:
        linear_step(model, optimizer)
        receipt = attachment.receipt()
    assert receipt["corrections"][0]["matched"] == ["2.weight", "2.bias"]
    assert "'adafisher' leaves alone Linear: 0.weight, 0.bias" in receipt["notes"]


def test_metrics_say_how_far_the_divisor_is_from_a_constant():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    correction = AdaFisher(refresh=1)
    assert correction.metrics() == {}
    spreads = []
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for index in range(12):
            linear_step(model, optimizer, index)
            numbers = attachment.metrics()
            low, mean, high = (
                numbers[f"adafisher/{size}_divisor"] for size in ("smallest", "mean", "largest")
            )
            assert 1 <= low <= mean <= high  # F is at least λ
            spreads.append(high / low)
    assert spreads[0] <= 0.008744 / 0.0074 + 1e-9
    assert spreads[-1] <= 1.0757


def test_the_control_divides_every_element_by_the_same_mean():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    correction = AdaFisher(refresh=2, damping=0.01)
    control = correction.control(optimizer)
    assert control.name == "mean-fisher"
    assert control.corrections == ("adafisher:refresh=2,damping=0.01,fisher=mean",)
    made = regrad.create(control.corrections[0])
    assert made.control(optimizer) is None
    with regrad.attach(model, optimizer, [made]) as attachment:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        functional.cross_entropy(model(inputs), torch.tensor([0, 1] * 3)).backward()
        raw = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        mean = attachment.metrics()["adafisher/mean_divisor"]
        state = attachment.state_dict()["corrections"]["adafisher"]
    elements = torch.cat(
        [torch.outer(kept["outputs"], kept["inputs"]).flatten() for kept in state.values()]
    )
    assert mean == pytest.approx(elements.mean().item() / 0.01 + 1, rel=1e-12)
    for before, parameter in zip(raw, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad * mean, before)


def test_the_published_warm_up_of_the_control_is_the_known_one():
    """F̄ is .0078 in the first 100 steps, .0011 until 200, then .00102, roughly."""
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    means = []
    with regrad.attach(model, optimizer, [AdaFisher(refresh=1, fisher="mean")]) as attachment:
        for index in range(3):
            linear_step(model, optimizer, index)
            means.append(1e-3 * attachment.metrics()["adafisher/mean_divisor"])
    for mean, known in zip(means, (0.0078, 0.0011, 0.00102), strict=True):
        assert mean == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_an_optimizer_that_divides_itself_is_refused_unless_that_is_meant(kind):
    model = make_linear()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    with pytest.raises(regrad.RegradError, match=f"divides by nothing itself, got {kind}; use SGD"):
        regrad.attach(model, optimizer, ["adafisher"])
    with regrad.attach(model, optimizer, ["adafisher:allow_adaptive=true"]):
        linear_step(model, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
        ({"damping": 0.0}, r"damping must be positive and finite, got 0\.0"),
        ({"damping": math.inf}, "damping must be positive and finite, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaFisher(**options)


def test_a_name_of_no_layer_and_a_model_without_layers_are_refused():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"select must name modules .*, got \('1',\); .* name 0, 2"
    ):
        regrad.attach(model, optimizer, [AdaFisher(select=("1",))])
    plain = nn.GroupNorm(1, 4)
    with pytest.raises(
        regrad.RegradError, match=r"must find a Linear, .*, got GroupNorm without any"
    ):
        regrad.attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), ["adafisher"])


def test_the_idle_reason_is_told_where_nothing_was_differentiated():
    assert "no supported layer was called" in AdaFisher().idle_reason()


def test_state_that_is_none_is_refused():
    model = make_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, ["adafisher"]) as attachment:
        linear_step(model, optimizer)
        state = attachment.state_dict()
        state["corrections"]["adafisher"]["0"] = {"inputs": torch.ones(4)}
        with pytest.raises(regrad.RegradError, match="'adafisher' must be what its state_dict"):
            attachment.load_state_dict(state)
