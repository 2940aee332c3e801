import pytest
import torch
from regrad_runner.models.binary import (
    BinaryConv2d,
    BinaryLinear,
    binary_layers,
    binary_network,
    signs,
)
from torch.nn import functional as F


def test_the_sign_of_zero_is_one_and_numbers_keep_their_format():
    values = torch.tensor([-3.0, -0.0, 0.0, 1e-30], dtype=torch.bfloat16)
    assert signs(values).tolist() == [-1.0, 1.0, 1.0, 1.0]
    assert signs(values).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("straight-through", [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        # 2 + 2x on [-1, 0), 2 - 2x on [0, 1)
        ("approx-sign", [0.0, 0.0, 1.5, 2.0, 0.5, 0.0, 0.0]),
    ],
)
def test_the_estimators_have_their_derivatives(estimator, wanted):
    values = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.75, 1.0, 1.5], requires_grad=True)
    weights = torch.arange(1.0, 8.0)
    (weights * signs(values, estimator)).sum().backward()
    torch.testing.assert_close(values.grad, weights * torch.tensor(wanted))


def test_a_layer_uses_the_signs_of_weight_and_inputs():
    layer = BinaryConv2d(2, 3, 3, stride=2, padding=1)
    images = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = F.conv2d(images.sign(), layer.weight.sign(), stride=2, padding=1)
    assert torch.equal(layer(images), wanted)
    linear = BinaryLinear(5, 2)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(rows), rows.sign() @ linear.weight.sign().T)


def test_real_inputs_and_real_weights_are_used_as_they_are():
    layer = BinaryLinear(5, 2, real_inputs=True)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(rows), rows @ layer.weight.sign().T)
    layer.real_weights = True
    torch.testing.assert_close(layer(rows), rows @ layer.weight.T)


def test_a_scaled_weight_has_the_mean_size_of_its_output_and_no_gradient_from_it():
    layer = BinaryLinear(2, 2, scaled=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.1], [0.25, 2.0]]))
    torch.testing.assert_close(layer.used_weight(), torch.tensor([[0.3, -0.3], [1.125, 1.125]]))
    layer.used_weight().sum().backward()
    # Straight through where |θ| ≤ 1, times the scale.
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.3, 0.3], [1.125, 0.0]]))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_weight_of_signs_is_used_as_it_is_and_gets_the_exact_gradient(scaled):
    layer = BinaryLinear(6, 3, scaled=scaled)
    with torch.no_grad():
        layer.weight.sign_()
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    plain = layer.weight.detach().clone().requires_grad_()
    layer(rows).square().sum().backward()
    (rows.sign() @ plain.T).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.grad)


def test_the_network_is_fixed_by_its_seed_and_draws_no_global_number():
    before = torch.get_rng_state()
    one, other, third = (binary_network(classes=10, channels=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.conv1.weight, third.conv1.weight)
    assert [tuple(layer.weight.shape[:2]) for layer in binary_layers(one)] == [
        (16, 1),
        (32, 16),
        (32, 32),
    ]


def test_the_estimator_is_that_of_the_inputs():
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for estimator in ("straight-through", "approx-sign"):
        model = binary_network(classes=10, channels=1, width=4, estimator=estimator)
        model(images).square().sum().backward()
        gradients.append(model.conv1.weight.grad)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        binary_network(**{"classes": 10, "channels": 1, **options})
