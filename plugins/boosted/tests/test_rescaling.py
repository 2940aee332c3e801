"""What several exits use receives the mean of their gradients, read off the graph."""

import re

import pytest
import torch
from regrad import RegradError
from regrad_boosted import Boosted
from regrad_boosted.rescaling import average_over_exits
from torch import nn


class Chain(nn.Module):
    """Three stages with an exit after each, of linear layers; the exits' losses are sums."""

    def __init__(self, generator):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, inputs):
        outputs = []
        features = inputs
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = torch.tanh(stage(features))
            outputs.append(head(features))
        return outputs


class Scaled(torch.autograd.Function):
    """The published form: the identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, inputs, factor):
        ctx.factor = factor
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.factor, None


def as_published(model, inputs):
    """Run a chain with the published functions between its stages."""
    outputs = []
    features = inputs
    count = len(model.stages)
    for i, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        features = Scaled.apply(torch.tanh(stage(features)), 1 / (count - i))
        outputs.append(head(features))
        features = Scaled.apply(features, count - i - 1)
    return outputs


@pytest.fixture
def model(generator):
    return Chain(generator)


@pytest.fixture
def inputs(generator):
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


def loss_of(outputs):
    return sum(output.square().mean() for output in outputs)


def gradients(model, loss):
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True),
            strict=True,
        )
    )


def test_gradients_of_one_two_and_three_have_the_mean_two():
    trunk = torch.ones(1, requires_grad=True)
    exits = [1 * trunk, 2 * trunk, 3 * trunk]
    average_over_exits(exits)
    sum(exits).backward()
    assert trunk.grad.item() == 2.0


def test_a_chain_gets_what_the_published_recursion_says(reference):
    stage_slopes, exit_slopes = (0.5, -3.0), (1.0, 2.0, -5.0)
    first = torch.ones((), dtype=torch.float64, requires_grad=True)
    places = [first * 1.0]
    for slope in stage_slopes:
        places.append(places[-1] * slope)
    for place in places:
        place.retain_grad()
    exits = [place * slope for place, slope in zip(places, exit_slopes, strict=True)]
    average_over_exits(exits)
    sum(exits).backward()
    found = [place.grad.item() for place in places]
    # retain_grad shows a place's own gradient, before the node that made it hands it on
    wanted = reference.rescaled(stage_slopes, exit_slopes)
    assert found == pytest.approx(wanted, rel=1e-15)


def test_a_network_gets_the_gradients_of_the_published_functions(model, inputs):
    outputs = model(inputs)
    average_over_exits(outputs)
    ours = gradients(model, loss_of(outputs))
    theirs = gradients(model, loss_of(as_published(model, inputs)))
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-13, atol=1e-15), name


def test_a_parameter_gets_its_plain_gradient_over_the_exits_that_depend_on_it(model, inputs):
    plain = gradients(model, loss_of(model(inputs)))
    outputs = model(inputs)
    average_over_exits(outputs)
    ours = gradients(model, loss_of(outputs))
    for name, gradient in ours.items():
        exits = 3 - int(name.split(".")[1]) if name.startswith("stages") else 1
        assert torch.allclose(gradient, plain[name] / exits, rtol=1e-13, atol=1e-16), name


def test_rescaling_twice_is_rescaling_once(model, inputs):
    outputs = model(inputs)
    average_over_exits(outputs)
    once = gradients(model, loss_of(outputs))
    average_over_exits(outputs)
    twice = gradients(model, loss_of(outputs))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_exits_without_gradients_do_not_count(model, inputs):
    with torch.no_grad():
        frozen = model(inputs)[0]
    outputs = [frozen, *model(inputs)[1:]]
    average_over_exits(outputs)
    ours = gradients_of(model.stages[0], loss_of(outputs))
    plain = gradients_of(model.stages[0], loss_of(model(inputs)[1:]))
    assert torch.allclose(ours, plain / 2, rtol=1e-13)


def gradients_of(stage, loss):
    return torch.autograd.grad(loss, stage.weight)[0]


def test_leaves_and_evaluation_are_left_alone(model, inputs):
    average_over_exits([torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)])
    with torch.no_grad():
        average_over_exits(model(inputs))


def test_one_exit_changes_nothing(model, inputs):
    outputs = model(inputs)[2:]
    plain = gradients_of(model.stages[0], loss_of(model(inputs)[2:]))
    average_over_exits(outputs)
    assert torch.equal(gradients_of(model.stages[0], loss_of(outputs)), plain)


def test_outputs_of_one_node_are_refused(model, inputs):
    stacked = torch.stack(model(inputs))
    message = (
        "rescale must see which exits a tensor feeds, but several outputs come from one node of "
        "the graph, UnbindBackward0; compile the model's parts instead of the whole"
    )
    with pytest.raises(RegradError, match=re.escape(message)):
        average_over_exits(stacked.unbind())


def test_a_compiled_model_is_refused(model, inputs):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RegradError, match="several outputs come from one node"):
        average_over_exits(compiled(inputs))


def test_a_compiled_step_is_refused_too():
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def loss_of_exits(trunk):
        exits = [1 * trunk, 2 * trunk]
        average_over_exits(exits)
        return exits[0] + exits[1]

    with pytest.raises(RegradError, match="several outputs come from one node"):
        loss_of_exits(torch.ones(1, requires_grad=True))


def test_hooks_go_with_the_graph(model, inputs):
    outputs = model(inputs)
    average_over_exits(outputs)
    loss_of(outputs).backward()
    del outputs
    plain = gradients(model, loss_of(model(inputs)))
    again = gradients(model, loss_of(model(inputs)))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_rescaling_needs_a_layout_that_shows_the_whole_model():
    # FSDP1 does not: its one tensor holds the parameters of all exits.
    assert "model" in Boosted(rescale=True).needs.reads
    assert "one tensor" in Boosted(rescale=True).needs.conflicts["flat"]
    assert "model" not in Boosted().needs.reads
