"""The layers that have a divisor, and what they sum over the micro-batches of a step."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from regrad.hooks import WRAPPER
from torch import Tensor, nn
from torch.nn import functional

from regrad_adafisher.functional import (
    channel_sums,
    sum_of_patch_squares,
    sum_of_squares,
    sum_over_rows,
)


class Moments(NamedTuple):
    """Second moments of a layer, before they are normalised.

    Attributes:
        inputs: Of what the weight multiplies, and at the end of the bias's 1.
        outputs: Of the gradients of the outputs.
    """

    inputs: Tensor
    outputs: Tensor


class Layer(ABC):
    """One module, and the sums of the micro-batches so far.

    Args:
        name: Of the module in the model, without wrappers.
        module: Whose weight or bias is a parameter of its own. The other one may be a buffer, or
            be computed from other parameters: the rule reads inputs and gradients of outputs.

    Attributes:
        has_bias_column: Whether `Moments.inputs` ends with an element for the bias.
        inputs: What is summed over the inputs; None before the first micro-batch.
        gradients: What is summed over the gradients of the outputs; None before the first.
        rows: How many rows the sums have.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.has_bias_column = module.bias is not None
        self.inputs: Tensor | None = None
        self.gradients: Tensor | None = None
        self.rows = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """What is summed in."""
        return torch.promote_types(self.parameters()[0].dtype, torch.float32)

    @property
    def outputs(self) -> int:
        """How many outputs, or channels, have a gradient of their own."""
        return len(self.parameters()[0])

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.parameters()[0].device

    def parameters(self) -> list[nn.Parameter]:
        """Return weight and bias, of those that are parameters of the module itself."""
        return [*own_parameters(self.module).values()]

    def has_gradient(self) -> bool:
        """Say whether weight or bias has a gradient now."""
        return any(parameter.grad is not None for parameter in self.parameters())

    def is_trainable(self) -> bool:
        """Say whether weight or bias may get a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @abstractmethod
    def sum_inputs(self, inputs: Tensor, output: torch.Size) -> Tensor:
        """Return what one call adds to `inputs`.

        Args:
            inputs: Of the call, in `dtype`.
            output: The shape of what it returned.
        """

    @abstractmethod
    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """Return what one call adds to `gradients`, from a gradient in `dtype`."""

    @abstractmethod
    def count_rows(self, gradient: Tensor) -> int:
        """Return how many rows one call adds."""

    @abstractmethod
    def moments(self, scale: float) -> Moments:
        """Return the second moments of all rows.

        Args:
            scale: Factor that the gradients of the outputs have and shall not have.
        """

    def accepts(self, inputs: Tensor) -> bool:
        """Say whether an input has the dimensions that the rule speaks of."""
        return True

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add one call.

        Args:
            inputs: What `sum_inputs` returned.
            gradient: Of its output.
        """
        gradients = self.sum_gradients(gradient.to(self.dtype))
        self.rows += self.count_rows(gradient)
        self.inputs = inputs if self.inputs is None else sum_of_both(self.inputs, inputs)
        self.gradients = gradients if self.gradients is None else self.gradients + gradients

    def divide(self, number: int) -> None:
        """Divide the sums and the count by a number."""
        self.rows /= number
        if self.inputs is not None and self.gradients is not None:
            self.inputs = self.inputs / number
            self.gradients = self.gradients / number

    def forget(self) -> None:
        """Drop the sums."""
        self.inputs = None
        self.gradients = None
        self.rows = 0.0


class RowLayer(Layer):
    """A layer whose weight multiplies rows: moments are means over them."""

    def moments(self, scale: float) -> Moments:
        """Return the means over the rows."""
        if self.inputs is None or self.gradients is None:
            raise ValueError(f"sums must be there before their means, got none for {self.name!r}")
        return Moments(self.inputs / self.rows, self.gradients / (self.rows * scale**2))

    def with_bias_column(self, sums: Tensor, sum_of_ones: float) -> Tensor:
        """Return sums over the inputs with that of the bias's 1 at their end, if there is one."""
        if not self.has_bias_column:
            return sums
        return torch.cat([sums, sums.new_tensor([sum_of_ones])])


class LinearLayer(RowLayer):
    """A linear layer: every leading dimension counts rows."""

    def sum_inputs(self, inputs: Tensor, output: torch.Size) -> Tensor:
        """Return the sum of squares of each input."""
        rows = inputs.shape[:-1].numel()
        return self.with_bias_column(sum_of_squares(inputs, axis=-1), rows)

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """Return the sum of squares of each output's gradient."""
        return sum_of_squares(gradient, axis=-1)

    def count_rows(self, gradient: Tensor) -> int:
        """Return the product of the leading dimensions."""
        return gradient.numel() // self.outputs


class ConvolutionLayer(RowLayer):
    """A two-dimensional convolution without groups: every position of its output is a row.

    Squares of inputs are divided by the positions of a sample, as known numbers of the authors'
    code show.
    """

    def sum_inputs(self, inputs: Tensor, output: torch.Size) -> Tensor:
        """Return the sum of squares of each element of the patches, per position of a sample."""
        images = inputs if inputs.dim() == 4 else inputs.unsqueeze(0)
        squares = sum_of_patch_squares(
            images,
            kernel_size=self.module.kernel_size,
            stride=self.module.stride,
            padding=_padding_of(self.module),
            padding_mode=self.module.padding_mode,
            dilation=self.module.dilation,
        )
        return self.with_bias_column(squares / output[-2:].numel(), len(images))

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """Return the sum of squares of each output channel's gradient."""
        return sum_of_squares(gradient, axis=-3)

    def count_rows(self, gradient: Tensor) -> int:
        """Return samples times positions."""
        return gradient.numel() // self.outputs


class NormalisationLayer(Layer):
    """Batch or layer normalisation: squares of sums over a sample, two numbers for the inputs."""

    def __init__(self, name: str, module: Any, *, feature_axis: int) -> None:
        super().__init__(name, module)
        self.has_bias_column = True
        self._feature_axis = feature_axis

    def accepts(self, inputs: Tensor) -> bool:
        """Say whether there are samples and channels."""
        return inputs.dim() >= 2

    def sum_inputs(self, inputs: Tensor, output: torch.Size) -> Tensor:
        """Return u of each channel, which is dimension 1."""
        return channel_sums(inputs)

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        """Return the sum of each feature's gradient."""
        return sum_over_rows(gradient, axis=self._feature_axis)

    def count_rows(self, gradient: Tensor) -> int:
        """Return the samples."""
        return len(gradient)

    def moments(self, scale: float) -> Moments:
        """Return (sum of u², channels)/B² and (sum of gradients)²/B, of B samples."""
        if self.inputs is None or self.gradients is None:
            raise ValueError(f"sums must be there before moments, got none for {self.name!r}")
        channels = self.inputs.new_tensor(len(self.inputs))
        inputs = torch.stack([self.inputs.square().sum(), channels]) / self.rows**2
        return Moments(inputs, (self.gradients / scale).square() / self.rows)


def sum_of_both(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of two vectors; the shorter one ends with zeros.

    Layer normalisation sums over the samples of each token, of which micro-batches may have
    different numbers.
    """
    length = max(len(one), len(other))
    return padded_to(one, length) + padded_to(other, length)


def padded_to(vector: Tensor, length: int) -> Tensor:
    """Return a vector with zeros at its end, so that it has this length."""
    missing = length - len(vector)
    return functional.pad(vector, (0, missing)) if missing else vector


def _padding_of(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return what a convolution adds left, right, at the top and at the bottom."""
    if not isinstance(module.padding, str):
        height, width = module.padding
        return width, width, height, height
    if module.padding == "valid":
        return 0, 0, 0, 0
    spans = [
        dilation * (kernel - 1)
        for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True)
    ]
    height, width = spans
    return width // 2, width - width // 2, height // 2, height - height // 2


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias by these names, of those that are parameters of the module itself.

    A buffer, or what a parametrization computes, is none; and it is not read here, since some
    change by being read. Other parameters that a module may hold are none either.
    """
    found = {name: module._parameters.get(name) for name in ("weight", "bias")}
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """Return a module as a layer with a divisor, or None if it has no parameter that gets one.

    A class that computes its forward in its own way is none. Where weight and bias come from is of
    no matter: a frozen weight and the same numbers in a buffer give the bias the same divisor.
    """
    own = own_parameters(module)
    if not own or not all(parameter.is_floating_point() for parameter in own.values()):
        return None
    forward: Any = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearLayer(name, module)
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward and module.groups == 1:
        return ConvolutionLayer(name, module)
    if isinstance(module, nn.BatchNorm2d) and forward is nn.BatchNorm2d.forward:
        return NormalisationLayer(name, module, feature_axis=1)
    is_layer_norm = isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward
    if is_layer_norm and all(parameter.dim() == 1 for parameter in own.values()):
        return NormalisationLayer(name, module, feature_axis=-1)
    return None


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers of a model that have a divisor, each module once, in the model's order."""
    found: list[Layer] = []
    for path, module in model.named_modules():
        layer = layer_of(re.sub(WRAPPER, "", f"{path}.").rstrip("."), module)
        if layer is not None:
            found.append(layer)
    return found


def one_of_each(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return, by the name of each layer, the first one that has the same weight and bias.

    Modules that share both are one module that is called several times.
    """
    firsts: dict[tuple[Any, ...], Layer] = {}
    return {
        layer.name: firsts.setdefault((type(layer), *_tensors_of(layer.module)), layer)
        for layer in layers
    }


def _tensors_of(module: nn.Module) -> tuple[int, ...]:
    """Return which weight and bias a module has; of a computed weight only itself knows."""
    weight, bias = (
        id(module._parameters.get(name, module._buffers.get(name))) for name in ("weight", "bias")
    )
    return (weight, bias) if weight != id(None) else (id(module),)
