"""Layers whose weights and inputs are used by their signs alone, and a small network of them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Estimator = Literal["straight-through", "approx-sign"]
BINARY_WIDTH = 16  # channels of the first layer, unless told otherwise


def binary_network(
    *,
    classes: int,
    channels: int,
    width: int = BINARY_WIDTH,
    estimator: Estimator = "straight-through",
    scaled: bool = False,
    seed: int = 0,
) -> nn.Module:
    r"""Return three binary 3×3 convolutions with batch normalisation, an average and a real head.

    They have `width`, 2 `width` and 2 `width` channels; the second and third halve the image. The
    first one sees the pixels as they are, the others the signs of their inputs. The last features
    are cut to [-1, 1] before their average. Weights of the convolutions start from a uniform
    distribution within :math:`1/\sqrt{\text{fan-in}}`, those of the head from a normal one with
    variance 2 / fan-in.

    Args:
        classes: Number of outputs, at least 2.
        channels: Channels of the images, at least 1.
        width: Channels of the first convolution, at least 1.
        estimator: What stands for the derivative of the inputs' signs.
        scaled: Whether weights are signs times the mean absolute value of their output's weights.
        seed: Fixes the initial weights. No global random number is drawn.

    Returns:
        The model in training mode, on the CPU, in float32: images [B, channels, H, W] to logits [B,
        classes].

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> model = binary_network(classes=10, channels=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    References:
        Hubara, Courbariaux, Soudry, El-Yaniv and Bengio, 2016, "Binarized Neural Networks", for
        signs with the straight-through estimator; Rastegari, Ordonez, Redmon and Farhadi, 2016,
        "XNOR-Net", for the scale; Liu, Wu, Luo, Yang, Liu and Cheng, 2018, "Bi-Real Net", for
        ApproxSign.
    """
    smallest = {"classes": (classes, 2), "channels": (channels, 1), "width": (width, 1)}
    for option, (value, least) in smallest.items():
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value!r}")
    # Modules draw their default weights when they are made; the fork puts the global state back.
    with torch.random.fork_rng(devices=[]):
        model = BinaryNetwork(classes, channels, width=width, estimator=estimator, scaled=scaled)
    _initialize(model, torch.Generator().manual_seed(seed))
    return model


def plain_signs(values: Tensor) -> Tensor:
    """Return the signs of values as numbers: -1 and +1, 1 of 0, in the values' number format.

    Example:
        >>> plain_signs(torch.tensor([-0.25, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])
    """
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


class _Sign(torch.autograd.Function):
    """The sign, 1 of 0; a subclass says what stands for its derivative, in `backward`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return plain_signs(values)


class _StraightThrough(_Sign):
    """The sign with the derivative 1 within [-1, 1] and 0 outside."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        passed: Tensor = gradient * (values.abs() <= 1)
        return passed


class _ApproxSign(_Sign):
    """The sign with the derivative 2 - 2|x| within [-1, 1] and 0 outside."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        passed: Tensor = gradient * (2 - 2 * values.abs()).clamp_(min=0)
        return passed


def signs(values: Tensor, estimator: Estimator = "straight-through") -> Tensor:
    """Return the signs of values, 1 of 0, with a derivative that is an estimate.

    Args:
        values: Real, any shape.
        estimator: "straight-through", 1 within [-1, 1], else 0; or "approx-sign", that of a
            parabola on either side of 0: 2 - 2 abs(x) within [-1, 1], else 0.

    Returns:
        -1 and +1, shape and dtype of `values`.

    Example:
        >>> values = torch.tensor([-0.25, 0.0, 3.0], requires_grad=True)
        >>> signs(values, "approx-sign").sum().backward()
        >>> values.grad
        tensor([1.5000, 2.0000, 0.0000])
    """
    function = _ApproxSign if estimator == "approx-sign" else _StraightThrough
    result: Tensor = function.apply(values)
    return result


class BinaryLayer(nn.Module):
    """What `BinaryConv2d` and `BinaryLinear` share: how they use their weight and their inputs.

    The weight is latent where an optimizer trains a real number; one that holds -1 and +1 itself
    is used as it is, and its gradient is exact, since signs and estimator leave those alone.

    Attributes:
        estimator: Of the inputs' signs; the weight's is "straight-through".
        scaled: Whether signs are multiplied by the mean absolute value of their output's weights,
            which gets no gradient.
        real_inputs: Whether inputs are used as they are.
        real_weights: Whether the weight is used as it is: the first step of two-step training.
    """

    weight: Tensor
    estimator: Estimator
    scaled: bool
    real_inputs: bool
    real_weights: bool

    def used_inputs(self, inputs: Tensor) -> Tensor:
        """Return the inputs as the layer uses them: their signs, or as they are."""
        return inputs if self.real_inputs else signs(inputs, self.estimator)

    def used_weight(self) -> Tensor:
        """Return the weight as the layer uses it: its signs, scaled or not, or as it is."""
        if self.real_weights:
            return self.weight
        binary = signs(self.weight)
        if not self.scaled:
            return binary
        per_output = list(range(1, self.weight.dim()))
        return binary * self.weight.detach().abs().mean(per_output, keepdim=True)


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    """A convolution without bias that uses signs; zeros are padded.

    Args:
        channels_in: Channels of the inputs.
        channels_out: Channels of the outputs.
        kernel_size: Height and width of the kernel.
        stride: Pixels between outputs.
        padding: Pixels of zeros around the inputs.
        estimator: As in `BinaryLayer`.
        scaled: As in `BinaryLayer`.
        real_inputs: As in `BinaryLayer`.

    Example:
        >>> layer = BinaryConv2d(1, 4, 3, padding=1)
        >>> layer(torch.ones(1, 1, 5, 5))[0, 0, 2, 2] == signs(layer.weight)[0].sum()
        tensor(True)
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        estimator: Estimator = "straight-through",
        scaled: bool = False,
        real_inputs: bool = False,
    ) -> None:
        super().__init__(
            channels_in, channels_out, kernel_size, stride=stride, padding=padding, bias=False
        )
        self.estimator = estimator
        self.scaled = scaled
        self.real_inputs = real_inputs
        self.real_weights = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features [B, channels_out, H', W'] of inputs [B, channels_in, H, W]."""
        inputs = self.used_inputs(inputs)
        return F.conv2d(inputs, self.used_weight(), None, self.stride, self.padding)


class BinaryLinear(BinaryLayer, nn.Linear):
    """A linear layer without bias that uses signs.

    Args:
        features_in: Size of the inputs.
        features_out: Size of the outputs.
        estimator: As in `BinaryLayer`.
        scaled: As in `BinaryLayer`.
        real_inputs: As in `BinaryLayer`.

    Example:
        >>> layer = BinaryLinear(3, 2)
        >>> bool((layer(torch.tensor([0.5, 2.0, 7.0])) == signs(layer.weight).sum(1)).all())
        True
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        estimator: Estimator = "straight-through",
        scaled: bool = False,
        real_inputs: bool = False,
    ) -> None:
        super().__init__(features_in, features_out, bias=False)
        self.estimator = estimator
        self.scaled = scaled
        self.real_inputs = real_inputs
        self.real_weights = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs [*, features_out] of inputs [*, features_in]."""
        return F.linear(self.used_inputs(inputs), self.used_weight())


class BinaryNetwork(nn.Module):
    """The network that `binary_network` returns; `fc` is its output layer."""

    def __init__(
        self, classes: int, channels: int, *, width: int, estimator: Estimator, scaled: bool
    ) -> None:
        super().__init__()
        self.conv1 = BinaryConv2d(channels, width, 3, padding=1, scaled=scaled, real_inputs=True)
        self.norm1 = nn.BatchNorm2d(width)
        halving: dict[str, Any] = {
            "stride": 2,
            "padding": 1,
            "estimator": estimator,
            "scaled": scaled,
        }
        self.conv2 = BinaryConv2d(width, 2 * width, 3, **halving)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = BinaryConv2d(2 * width, 2 * width, 3, **halving)
        self.norm3 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, C, H, W]."""
        features = self.norm1(self.conv1(images))
        features = self.norm2(self.conv2(features))
        features = F.hardtanh(self.norm3(self.conv3(features)))
        return self.fc(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def binary_layers(model: nn.Module) -> list[BinaryLayer]:
    """Return the binary layers of a model, in the order in which they were registered."""
    return [module for module in model.modules() if isinstance(module, BinaryLayer)]


@torch.no_grad()
def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw new weights from the generator."""
    for module in model.modules():
        if isinstance(module, BinaryLayer):
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.weight.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
