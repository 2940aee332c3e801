"""Units by module type and the classifier head, against the reference's own units."""

import pytest
import regrad
import torch
from regrad_clipping import AGC
from regrad_clipping.functional import Unit
from regrad_clipping.units import holdings, unit_of
from torch import nn


class Gain(nn.Module):
    """A parameter of its own, as normalisation-free networks have."""

    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(shape))


LAYERS = {
    "linear": lambda: nn.Linear(3, 4),
    "linear of one input": lambda: nn.Linear(1, 4),
    "conv1d": lambda: nn.Conv1d(3, 4, 2),
    "conv2d": lambda: nn.Conv2d(3, 4, 2),
    "conv3d": lambda: nn.Conv3d(3, 4, 2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "depthwise of one element": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2),
    "transposed in groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "transposed depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "embedding": lambda: nn.Embedding(5, 3),
    "embedding of one dimension": lambda: nn.Embedding(5, 1),
    "packed attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "unpacked attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
    "layer norm of an image": lambda: nn.LayerNorm([3, 4, 4]),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "gain": lambda: Gain(4, 1, 1),
    "scalar": Gain,
    "position table": lambda: Gain(1, 5, 3),
    "matrix": lambda: Gain(4, 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_agc_clips_every_layer_as_the_reference_does(kind, reference, generator):
    model = nn.Module()
    model.layer = LAYERS[kind]().double()
    expected = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                )
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            every = reference.units(module, name, parameter.shape)
            clipped = reference.clip_adaptive(parameter.grad, parameter.detach(), every, 0.8, 1e-3)
            expected[f"{path}.{name}"] = clipped.view(parameter.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, [AGC(max_ratio=0.8, head=None)]) as attachment:
        attachment.engine.forwards = 1  # no forward is under test here
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-14, atol=0)


def test_units_by_hand():
    assert unit_of(nn.Linear(1, 4), "weight", torch.empty(4, 1)) == Unit(0)
    assert unit_of(nn.Module(), "gain", torch.empty(4, 1, 1)) == Unit(None)
    assert unit_of(nn.LSTM(3, 4), "bias_ih_l0", torch.empty(16)) == Unit(None)
    assert unit_of(nn.LSTM(3, 4), "weight_ih_l0", torch.empty(16, 3)) == Unit(0)
    assert unit_of(nn.Bilinear(2, 3, 4), "weight", torch.empty(4, 2, 3)) == Unit(0)


def test_a_parametrised_weight_is_its_layers_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    found = {h.known_as: (h.module, h.attribute) for h in holdings(model)}
    assert found["0.parametrizations.weight.original1"] == ("0", "weight")
    assert found["0.bias"] == ("0", "bias")


class Net(nn.Module):
    """A body, a head, and an output of a chosen kind."""

    def __init__(self, finish, *, tied=False):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(
            4, 5, bias=not tied
        )  # before the body, so that the last parameters are not the head's
        self.body = nn.Linear(4, 4)
        self.finish = finish
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.finish(self.head(self.body(self.table(tokens))))


class Output:
    """As transformers return it."""

    def __init__(self, logits):
        self.loss, self.logits = logits.mean(), logits


def total(output):
    for _ in range(2):
        output = (
            output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
        )
    return output.square().sum()


def spared_by(model, inputs, **options):
    """Train one step; return the parameters whose gradient was left alone, and the notes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, [AGC(max_ratio=1e-7, **options)]) as attachment:
        total(model(inputs)).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        (row,) = attachment.receipt()["corrections"]
        same = {name for name, p in model.named_parameters() if torch.equal(p.grad, before[name])}
        assert {*before} - same == {*row["matched"]}
        return same, attachment.receipt()["notes"], str(attachment)


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 0]])
FINISHES = {
    "plain": lambda x: x,
    "activation in place": torch.nn.functional.relu_,
    "mapping": lambda x: {"loss": x.mean(), "logits": x},
    "object": Output,
    "reshaped, so the last linear layer": lambda x: x.flatten(0, 1),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("finish", FINISHES)
def test_the_heads_weight_is_left_alone_and_its_bias_is_not(finish, tied):
    spared, notes, printed = spared_by(Net(FINISHES[finish], tied=tied), TOKENS)
    name = "table.weight" if tied else "head.weight"
    assert spared == {name}
    assert f"'agc' leaves the classifier head alone: {name}" in notes
    assert f"head alone: {name}" in printed


def test_a_named_head_overrules_the_record_and_none_leaves_nothing_alone():
    assert spared_by(Net(lambda x: x), TOKENS, head="body")[0] == {"body.weight"}
    assert spared_by(Net(lambda x: x), TOKENS, head=None)[0] == set()


@pytest.mark.parametrize(("given", "spared"), [("1", "1.weight"), ("0.0", "0.0.weight")])
def test_a_layer_called_by_a_number_can_be_named_in_a_specification(given, spared):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.Linear(3, 3), nn.Linear(3, 2))
    with regrad.attach(
        model, torch.optim.SGD(model.parameters()), [f"agc:head={given}"]
    ) as attachment:
        assert f"'agc' leaves the classifier head alone: {spared}" in attachment.receipt()["notes"]


def test_a_convolution_may_be_the_head():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)
    )
    assert spared_by(model, torch.randn(2, 4))[0] == {"3.weight"}


def test_several_outputs_have_several_heads():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return torch.stack([self.one(self.body(x)).sum(), self.two(x).sum()])

    class TwoOutputs(Two):
        def forward(self, x):
            self.kept = self.one(self.body(x)), self.two(x)
            return self.kept

    model = TwoOutputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, ["agc"]) as attachment:
        sum(output.sum() for output in model(torch.ones(2, 4))).backward()
        optimizer.step()
        assert (
            "'agc' leaves the classifier head alone: one.weight, two.weight"
            in attachment.receipt()["notes"]
        )
    assert spared_by(Two(), torch.randn(2, 4))[0] == {"two.weight"}  # the last linear layer called


def test_a_model_that_is_one_linear_layer_is_all_head():
    assert spared_by(nn.Linear(3, 2), torch.randn(4, 3))[0] == {"weight"}


def test_a_parametrised_head_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    expected = {f"1.parametrizations.weight.original{i}" for i in range(2)}
    assert spared_by(model, torch.randn(4, 3))[0] == expected


def test_a_checkpointed_head_is_found():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(3, 3), checkpoint_wrapper(nn.Linear(3, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, ["agc"]) as attachment:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert "'agc' leaves the classifier head alone: 1.weight" in attachment.receipt()["notes"]


def test_a_model_without_linear_layers_must_name_its_head():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten())
    with pytest.raises(
        regrad.RegradError,
        match=r"saw no classifier head in a training forward \(.*\); pass head='name'",
    ):
        spared_by(model, torch.randn(2, 1, 2, 2))
    assert spared_by(model, torch.randn(2, 1, 2, 2), head="0")[0] == {"0.weight"}


def test_a_model_compiled_before_attach_must_name_its_head():
    model = torch.compile(Net(lambda x: x), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(
        regrad.RegradError, match="cannot see a compiled model's head; pass head='name', or attach"
    ):
        regrad.attach(model, optimizer, ["agc"])
    attachment = regrad.attach(model, optimizer, ["agc:head=head"])
    assert "head.weight" not in attachment.receipt()["corrections"][0]["matched"]
    assert "body.weight" in attachment.receipt()["corrections"][0]["matched"]
    attachment.detach()


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (
            lambda: Net(None),
            "haed",
            "head must name a module that has a weight, got 'haed'; did you mean 'head'",
        ),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())),
            "0",
            "did you mean '0.1'",
        ),
    ],
)
def test_a_head_that_is_no_layer_is_refused(model, head, message):
    model = model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=message):
        regrad.attach(model, optimizer, [AGC(head=head)])
    regrad.attach(model, optimizer, []).detach()


def test_the_axis_of_a_parameter_may_be_given(reference, generator):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with regrad.attach(model, optimizer, ["agc:head=none,axis=[0.w*=1,1.weight=none,*.weight=0]"]):
        model(torch.randn(5, 3, generator=generator, dtype=torch.float64)).sum().backward()
        before = [layer.weight.grad.clone() for layer in model]
        optimizer.step()
    columns = [torch.arange(12).view(4, 3)[:, i] for i in range(3)]
    rows = [torch.arange(8).view(2, 4)[i] for i in range(2)]
    for layer, grad, unit in zip(model, before, (columns, [torch.arange(16)], rows), strict=True):
        expected = reference.clip_adaptive(grad, layer.weight.detach(), unit, 0.01, 1e-3)
        torch.testing.assert_close(layer.weight.grad.flatten(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (
            ("body.weight",),
            "axis must be 'auto' or a list of 'pattern=dimension' or 'pattern=none', got 'body.weight'",
        ),
        (("body.weight=x",), "got 'body.weight=x'"),
        (
            ("bdy.*=1",),
            r"axis must name parameters of the model, got 'bdy\.\*', which matches none",
        ),
        (("body.*=1",), "axis must be below 1 for 'body.bias', got 1"),
    ],
)
def test_an_axis_that_cannot_be_is_refused(axis, message):
    model = Net(lambda x: x)
    with pytest.raises(ValueError, match=message):
        regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), [AGC(axis=axis)])
