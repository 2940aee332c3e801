"""Layers of which a part is not trained: frozen, a buffer, computed, shared, or trained later."""

import pytest
import regrad
import torch
from regrad_adafisher import AdaFisher
from regrad_adafisher.layers import layer_of
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

STEPS = 5


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 3)
        ).double()


def batch(index):
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (6,), generator=generator)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def take_step(model, optimizer, index):
    images, target = batch(index)
    optimizer.zero_grad()
    functional.cross_entropy(model(images), target).backward()
    optimizer.step()


def averages(attachment):
    found = {}
    for layer, kept in attachment.state_dict()["corrections"]["adafisher"].items():
        found[f"{layer}.inputs"] = kept["inputs"]
        found[f"{layer}.outputs"] = kept["outputs"]
    return found


def train(model, **options):
    """Train, and return the averages and the weights that only training changes."""
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=2, **options)]) as attachment:
        for index in range(STEPS):
            take_step(model, optimizer, index)
        found = averages(attachment)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return found | trained


class Same(nn.Module):
    """A parametrization that computes what it is given, and counts how often."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight.clone()


def freeze(module):
    module.weight.requires_grad_(False)


def put_in_a_buffer(module):
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)


def compute_from_a_frozen_one(module):
    parametrize.register_parametrization(module, "weight", Same())
    module.parametrizations.weight.original.requires_grad_(False)


def assign_before_each_forward(module):
    """As torch's older weight normalisation does: the weight is a plain attribute."""

    def assign(module, _):
        module.weight = module.weight_raw.clone()

    module.register_parameter("weight_raw", nn.Parameter(module.weight.detach().clone()))
    module.weight_raw.requires_grad_(False)
    del module.weight
    assign(module, ())
    module.register_forward_pre_hook(assign)


CONSTANTS = (freeze, put_in_a_buffer, compute_from_a_frozen_one, assign_before_each_forward)


@pytest.mark.parametrize("average", ["published", "ema"])
@pytest.mark.parametrize("fisher", ["factored", "mean"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_constant_weight_gives_the_bias_one_divisor_wherever_it_is_kept(layer, fisher, average):
    """The function and all gradients are the same, so must be what is trained."""
    found = []
    for make_constant in CONSTANTS:
        model = make_model()
        make_constant(model[layer])
        found.append(train(model, fisher=fisher, average=average))
    frozen, *others = found
    assert f"{layer}.bias" in frozen
    for other in others:
        assert other.keys() == frozen.keys()
        for name, tensor in frozen.items():
            assert torch.equal(other[name], tensor), name


def test_the_divisor_of_a_bias_alone_is_that_of_the_rule(reference):
    """H and S are of inputs and output gradients: that the weight is frozen changes neither."""
    model = make_model()
    for module in (model[0], model[3], model[4]):
        freeze(module)
    optimizer = sgd(model)
    seen = []
    hook = model[3].register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    images, target = batch(0)
    loss = functional.cross_entropy(model(images), target)
    (slope,) = torch.autograd.grad(loss, seen[0][1])
    hook.remove()
    fisher = reference.Fisher()
    fisher.refresh("3", model[3], seen[0][0][0].detach(), slope)
    with regrad.attach(model, optimizer, [AdaFisher()]):
        take_step(model, optimizer, 0)
    wanted = 1e-3 * slope.sum(dim=0) / fisher.divisor("3", "bias", model[3], model[3].bias)
    torch.testing.assert_close(model[3].bias.grad, wanted, rtol=1e-10, atol=1e-14)
    assert model[3].weight.grad is None


def test_a_parametrized_weight_is_left_alone_and_its_bias_is_not():
    plain, computed = make_model(), make_model()
    same = Same()
    parametrize.register_parametrization(computed[3], "weight", same)
    gradients = []
    for model in (plain, computed):
        optimizer = sgd(model)
        with regrad.attach(model, optimizer, [AdaFisher(select=("3",))]) as attachment:
            before = same.calls
            images, target = batch(0)
            functional.cross_entropy(model(images), target).backward()
            raw = {name: p.grad.clone() for name, p in model.named_parameters()}
            optimizer.step()
            receipt = attachment.receipt()
        gradients.append(model[3].bias.grad)
    assert torch.equal(*gradients)
    name = "3.parametrizations.weight.original"
    assert torch.equal(dict(computed.named_parameters())[name].grad, raw[name])
    assert not torch.equal(gradients[1], raw["3.bias"])
    assert same.calls == before + 1  # in the forward: a parametrization may change when it is read
    assert receipt["corrections"][0]["matched"] == ["3.bias"]
    assert name in "\n".join(receipt["notes"])


def test_a_weight_of_the_other_kind_of_normalisation_is_left_alone():
    model = make_model()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[3])
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, ["adafisher:select=[3]"]) as attachment:
        take_step(model, optimizer, 0)
        assert attachment.receipt()["corrections"][0]["matched"] == ["3.bias"]


def test_other_parameters_of_a_layer_are_left_alone():
    """As adapters of low rank have them, whose shape is none that F has."""
    model = make_model()
    model[3].register_parameter("factor", nn.Parameter(torch.ones(2, 7, dtype=torch.float64)))
    model[3].register_forward_hook(lambda m, _, output: output * m.factor.mean())
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, ["adafisher:select=[3]"]) as attachment:
        take_step(model, optimizer, 0)
        assert attachment.receipt()["corrections"][0]["matched"] == ["3.weight", "3.bias"]


def test_a_tied_constant_leaves_both_biases_their_divisors():
    """Frozen and shared by two layers, or one buffer in both."""
    found = []
    for make_constant in (freeze, put_in_a_buffer):
        model = make_model()
        model.insert(4, nn.Linear(4, 4).double())
        model.insert(5, nn.Linear(4, 4).double())
        with torch.no_grad():
            for parameter in model[4:6].parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        make_constant(model[4])
        if make_constant is freeze:
            model[5].weight = model[4].weight
        else:
            del model[5].weight
            model[5].register_buffer("weight", model[4].weight)
        found.append(train(model))
    frozen, buffer = found
    assert {"4.bias", "5.bias", "4.inputs", "5.inputs"} <= frozen.keys()
    assert frozen.keys() == buffer.keys()
    for name, tensor in frozen.items():
        assert torch.equal(buffer[name], tensor), name


@pytest.mark.parametrize("average", ["published", "ema"])
def test_a_layer_that_is_unfrozen_begins_its_averages_at_once(average):
    """Not at the next refresh, which may be far: until then it would be left alone."""
    model = make_model()
    optimizer = sgd(model)
    model[0].requires_grad_(False)
    with regrad.attach(model, optimizer, [AdaFisher(average=average)]) as attachment:
        for index in range(3):
            take_step(model, optimizer, index)
        before = averages(attachment)
        assert not any(name.startswith("0.") for name in before)
        assert not any("saw no call" in note for note in attachment.receipt()["notes"])
        model[0].requires_grad_(True)
        fresh = make_model()
        fresh.load_state_dict(model.state_dict())
        take_step(model, optimizer, 3)
        after = averages(attachment)
        take_step(model, optimizer, 4)
        assert averages(attachment).keys() == after.keys()
        for name, tensor in averages(attachment).items():
            assert torch.equal(tensor, after[name]), name  # once
    anew = sgd(fresh)
    with regrad.attach(fresh, anew, [AdaFisher(average=average)]) as attachment:
        take_step(fresh, anew, 3)
        wanted = averages(attachment)
    for name, tensor in after.items():
        expected = wanted[name] if name.startswith("0.") else before[name]
        assert torch.equal(tensor, expected), name


def test_a_layer_that_gets_gradients_without_calls_waits_for_the_next_refresh():
    """Its weight is used by a function; every step would ask the other ranks about it."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 2)

        def forward(self, rows):
            hidden = functional.linear(rows, self.first.weight, self.first.bias)
            return self.second(hidden)

    model = Functional()
    optimizer = sgd(model)
    correction = AdaFisher(refresh=3)
    with regrad.attach(model, optimizer, [correction]) as attachment:
        for index in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            assert [layer.name for layer in correction._to_refresh(index)] == (
                ["first", "second"] if index % 3 == 0 else []
            )
            optimizer.step()
        assert "saw no call of first," in "\n".join(attachment.receipt()["notes"])


def test_the_mean_of_the_control_is_over_what_has_gradients():
    """A gradient that the loop withholds is that of a frozen parameter."""

    def first_step(*, withhold):
        model = make_model()
        model[4].weight.requires_grad_(withhold)
        optimizer = sgd(model)
        with regrad.attach(model, optimizer, [AdaFisher(fisher="mean")]):
            images, target = batch(0)
            functional.cross_entropy(model(images), target).backward()
            model[4].weight.grad = None
            optimizer.step()
        return model[0].weight.grad

    assert torch.equal(first_step(withhold=True), first_step(withhold=False))


def test_a_layer_needs_a_parameter_of_its_own():
    module = nn.Linear(2, 2, bias=False)
    put_in_a_buffer(module)
    assert layer_of("name", module) is None
    module = nn.LayerNorm((2, 3))
    put_in_a_buffer(module)
    assert layer_of("name", module) is None


@pytest.mark.parametrize("options", [{}, {"average": "ema"}, {"fisher": "mean"}], ids=str)
@pytest.mark.parametrize("make_constant", [None, freeze, put_in_a_buffer])
def test_layers_that_share_weight_and_bias_are_one_layer_that_is_called_twice(
    make_constant, options
):
    found = []
    for is_shared in (True, False):
        model = make_model()
        if make_constant is not None:
            make_constant(model[4])
        twice = nn.Linear(4, 4).double()
        with torch.no_grad():
            for parameter in twice.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        if make_constant is not None:
            make_constant(twice)
        other = twice
        if is_shared:
            other = nn.Linear(4, 4)
            other.bias = twice.bias
            if make_constant is put_in_a_buffer:
                del other.weight
                other.register_buffer("weight", twice.weight)
            else:
                other.weight = twice.weight
        model.insert(4, other)
        model.insert(4, twice)
        found.append(train(model, **options))
    shared, called_twice = found
    assert {"4.bias", "4.inputs"} <= shared.keys()
    assert shared.keys() == called_twice.keys()
    for name, tensor in shared.items():
        assert torch.equal(called_twice[name], tensor), name


def test_layers_that_share_a_weight_alone_leave_it_alone():
    model = make_model()
    model.insert(4, nn.Linear(4, 4).double())
    model.insert(5, nn.Linear(4, 4).double())
    model[5].weight = model[4].weight
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [AdaFisher(select=("4", "5"))]) as attachment:
        take_step(model, optimizer, 0)
        receipt = attachment.receipt()
    assert receipt["corrections"][0]["matched"] == ["4.bias", "5.bias"]
    assert "shared by several modules: 4.weight" in "\n".join(receipt["notes"])


def test_shared_layers_of_which_one_is_not_selected_are_left_alone():
    model = make_model()
    model.insert(4, nn.Linear(4, 4).double())
    model.insert(5, nn.Linear(4, 4).double())
    model[5].weight, model[5].bias = model[4].weight, model[4].bias
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [AdaFisher(select=("3", "5"))]) as attachment:
        take_step(model, optimizer, 0)
        assert attachment.receipt()["corrections"][0]["matched"] == ["3.weight", "3.bias"]
