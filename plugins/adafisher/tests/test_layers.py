import pytest
import torch
from regrad_adafisher.layers import layer_of, layers_of, sum_of_both
from torch import nn

MODULES = {
    "linear": (nn.Linear(3, 2), (5, 3)),
    "linear without bias": (nn.Linear(3, 2, bias=False), (5, 3)),
    "linear on tokens": (nn.Linear(3, 2), (2, 4, 3)),
    "convolution": (nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2)), (2, 2, 5, 4)),
    "dilated": (nn.Conv2d(2, 3, 2, dilation=2, bias=False), (2, 2, 5, 4)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 4)),
    "batch norm": (nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "layer norm": (nn.LayerNorm(3), (4, 5, 3)),
    "layer norm on vectors": (nn.LayerNorm(3), (4, 3)),
    "layer norm on images": (nn.LayerNorm(3), (2, 4, 5, 3)),
}


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_in_parts(layer, h, s, parts, scale=1.0):
    for inputs, gradient in zip(h.chunk(parts), s.chunk(parts), strict=True):
        layer.add(layer.sum_inputs(inputs, gradient.shape), scale * gradient)
    return layer.moments(scale)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_moments_are_those_of_the_reference_also_in_parts_and_scaled(kind, parts, reference):
    module, shape = MODULES[kind]
    module = module.double()
    if shape[0] % parts:
        pytest.skip("these rows are not shared evenly")
    h = random(shape, 0)
    s = random(module(h).shape, 1) / len(h)
    layer = layer_of("name", module)
    assert layer.accepts(h)
    inputs, outputs = moments_in_parts(layer, h, s, parts, scale=64.0)
    wanted = reference.moments_of(module, h, s)
    torch.testing.assert_close(inputs, torch.tensor(wanted[0], dtype=torch.float64))
    torch.testing.assert_close(outputs, torch.tensor(wanted[1], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words_gives_as_many_patches_as_the_convolution_has_outputs(padding):
    module = nn.Conv2d(1, 1, (2, 4), padding=padding, bias=False).double()
    h = random((1, 1, 5, 6), 0)
    output = module(h).detach()
    layer = layer_of("name", module)
    module.weight.data.zero_()
    sums = layer.sum_inputs(h, output.shape) * output[0, 0].numel()
    for element, found in enumerate(sums.tolist()):
        module.weight.data.zero_().view(-1)[element] = 1
        assert module(h).square().sum().item() == pytest.approx(found, rel=1e-12)


def test_a_convolution_takes_one_image_without_a_batch():
    module = nn.Conv2d(2, 3, 2).double()
    h = random((2, 4, 4), 0)
    s = random(module(h).shape, 1)
    alone = moments_in_parts(layer_of("a", module), h[None], s[None], 1)
    layer = layer_of("b", module)
    layer.add(layer.sum_inputs(h, s.shape), s)
    for found, wanted in zip(layer.moments(1.0), alone, strict=True):
        torch.testing.assert_close(found, wanted)


def test_rows_of_micro_batches_are_those_of_the_batch_if_the_loop_divides_the_loss():
    """Sums of s², not of (n·s)²: a loss divided by the parts has the batch's 1/N in it already."""
    module = nn.Linear(3, 2).double()
    h, weight = random((32, 3), 0), random((32, 2), 1)

    def slopes(rows, divided_by):
        return weight[rows] / (len(weight[rows]) * divided_by)

    whole = moments_in_parts(layer_of("whole", module), h, slopes(slice(None), 1), 1)
    layer = layer_of("parts", module)
    by_count = torch.zeros(2, dtype=torch.float64)
    for start in range(0, 32, 8):
        rows = slice(start, start + 8)
        s = slopes(rows, divided_by=4)
        layer.add(layer.sum_inputs(h[rows], s.shape), s)
        by_count += (8 * s).square().sum(dim=0) / 32
    for found, wanted in zip(layer.moments(1.0), whole, strict=True):
        torch.testing.assert_close(found, wanted)
    of_the_batch = (32 * slopes(slice(None), 1)).square().mean(dim=0)
    torch.testing.assert_close(by_count * 16, of_the_batch)  # and not by_count


def test_sums_over_sequences_of_different_lengths_end_with_zeros():
    assert sum_of_both(torch.tensor([1.0, 2.0]), torch.ones(3)).tolist() == [2, 3, 1]
    assert sum_of_both(torch.ones(3), torch.tensor([1.0])).tolist() == [2, 1, 1]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv1d(2, 2, 3),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.LayerNorm((2, 3)),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.Embedding(3, 2),
        nn.Linear(2, 2, dtype=torch.complex64),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False)),
        Doubled(2, 2),
    ],
    ids=str,
)
def test_other_modules_are_no_layers(module):
    assert layer_of("name", module) is None


def test_layers_are_found_once_under_their_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict(
        {"a": shared, "b": shared, "c": nn.Sequential(nn.ReLU(), nn.Linear(2, 2))}
    )
    assert [layer.name for layer in layers_of(model)] == ["a", "c.1"]
    assert [layer.name for layer in layers_of(shared)] == [""]


def test_moments_without_sums_are_refused():
    for module in (nn.Linear(2, 2), nn.LayerNorm(2)):
        with pytest.raises(ValueError, match=r"sums must be there .*, got none for 'name'"):
            layer_of("name", module).moments(1.0)


def test_inputs_of_a_normalisation_must_have_samples_and_channels():
    assert not layer_of("name", nn.LayerNorm(3)).accepts(torch.zeros(3))
