"""AdaFisher by its formulas: float64, loops over rows, positions and elements, no cleverness.

From arXiv 2405.16397. Also the two networks on which three steps of it are known, number by number.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

SUPPORTED = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)


# ---- second moments of one layer, from all rows of a step


def mean_of_squares(rows):
    return [sum(row[j] ** 2 for row in rows) / len(rows) for j in range(len(rows[0]))]


def linear_moments(module, h, s):
    inputs = h.reshape(-1, h.shape[-1]).tolist()
    if module.bias is not None:
        inputs = [[*row, 1.0] for row in inputs]
    return mean_of_squares(inputs), mean_of_squares(s.reshape(-1, s.shape[-1]).tolist())


def patch(image, module, y, x):
    """The elements that one output position multiplies, by channel, row, column of the kernel."""
    elements = []
    for channel in range(image.shape[0]):
        for row in range(module.kernel_size[0]):
            for column in range(module.kernel_size[1]):
                down = y * module.stride[0] + row * module.dilation[0]
                across = x * module.stride[1] + column * module.dilation[1]
                elements.append(image[channel, down, across].item())
    return elements


def padded(module, h):
    height, width = module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(h, (width, width, height, height), mode=mode)


def convolution_moments(module, h, s):
    inputs, gradients = [], []
    for image, slopes in zip(padded(module, h), s, strict=True):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                ones = [] if module.bias is None else [1.0]
                inputs.append(patch(image, module, y, x) + ones)
                gradients.append(slopes[:, y, x].tolist())
    positions = s.shape[2] * s.shape[3]
    return [x / positions for x in mean_of_squares(inputs)], mean_of_squares(gradients)


def normalisation_inputs(h):
    batch, channels = h.shape[:2]
    positions = math.prod(h.shape[2:])
    u = [h[:, c].sum().item() / positions**2 for c in range(channels)]
    return [sum(x * x for x in u) / batch**2, channels / batch**2]


def batch_norm_moments(module, h, s):
    gradients = [s[:, c].sum().item() ** 2 / len(s) for c in range(s.shape[1])]
    return normalisation_inputs(h), gradients


def layer_norm_moments(module, h, s):
    gradients = [s[..., i].sum().item() ** 2 / len(s) for i in range(s.shape[-1])]
    return normalisation_inputs(h), gradients


def moments_of(module, h, s):
    """Return the second moments of inputs and output gradients, before they are normalised."""
    if isinstance(module, nn.Linear):
        return linear_moments(module, h, s)
    if isinstance(module, nn.Conv2d):
        return convolution_moments(module, h, s)
    if isinstance(module, nn.BatchNorm2d):
        return batch_norm_moments(module, h, s)
    return layer_norm_moments(module, h, s)


# ---- averages and divisor


def min_max(values, floor=1e-6, relative=False):
    counts_as = {math.inf: 1.0, -math.inf: 0.0}
    kept = [counts_as.get(x, x) for x in values]
    low, high = min(kept), max(kept)
    spread = high - low + (floor * high if relative else floor)
    return [(x - low) / spread if spread else 0.0 for x in kept]


class Fisher:
    """H and S of every layer by name, and F of a parameter."""

    def __init__(self, average="published", damping=1e-3):
        self.average = average
        self.damping = damping
        self.inputs = {}
        self.outputs = {}

    def refresh(self, name, module, h, s):
        inputs, gradients = moments_of(module, h, s)
        self.inputs[name] = self.advanced(self.inputs.get(name), inputs)
        self.outputs[name] = self.advanced(self.outputs.get(name), gradients)

    def advanced(self, old, values):
        if self.average == "published":
            old = [1.0] * len(values) if old is None else old
            return [0.08 * a + 0.008 * b for a, b in zip(old, min_max(values), strict=True)]
        seen = min_max(values, relative=True)
        return (
            seen if old is None else [0.92 * a + 0.08 * b for a, b in zip(old, seen, strict=True)]
        )

    def divisor(self, name, attribute, module, like):
        """Return F, of the parameter's shape; the last element of H is the bias's."""
        has_bias = not isinstance(module, nn.Linear | nn.Conv2d) or module.bias is not None
        inputs = self.inputs[name]
        if attribute == "bias":
            inputs = inputs[-1:]
        elif has_bias:
            inputs = inputs[:-1]
        rows = [[s * h + self.damping for h in inputs] for s in self.outputs[name]]
        return torch.tensor(rows, dtype=torch.float64).reshape(like.shape)


# ---- one step's rows and gradients


def observe(model, loss_of):
    """Return the loss, the inputs and output gradients of each supported layer, and all gradients."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, i, o, n=name: seen.append((n, m, i[0], o)))
        for name, module in model.named_modules()
        if isinstance(module, SUPPORTED)
    ]
    loss = loss_of(model)
    for hook in hooks:
        hook.remove()
    outputs = [output for _, _, _, output in seen]
    slopes = torch.autograd.grad(loss, [*outputs, *model.parameters()])
    layers = [
        (name, module, h.detach(), s) for (name, module, h, _), s in zip(seen, slopes, strict=False)
    ]
    return loss.item(), layers, list(slopes[len(outputs) :])


class AdaFisher:
    """The published optimizer: the momentum is divided, not what goes into it."""

    def __init__(self, model, rate=0.1, refresh=1, momentum=0.9, damping=1e-3, decay=0.0):
        self.model = model
        self.rate = rate
        self.refresh = refresh
        self.momentum = momentum
        self.decay = decay
        self.fisher = Fisher(damping=damping)
        self.steps = 0
        self.moments = [torch.zeros_like(p) for p in model.parameters()]

    def step(self, loss_of):
        """Take a step and return the loss before it."""
        loss, layers, gradients = observe(self.model, loss_of)
        if self.steps % self.refresh == 0:
            for name, module, h, s in layers:
                self.fisher.refresh(name, module, h, s)
        self.steps += 1
        bias_correction = 1 - self.momentum**self.steps
        for i, ((name, parameter), gradient) in enumerate(
            zip(self.model.named_parameters(), gradients, strict=True)
        ):
            decayed = gradient + self.decay * parameter.detach()
            self.moments[i] = self.momentum * self.moments[i] + (1 - self.momentum) * decayed
            where, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(where)
            divisor = self.fisher.divisor(where, attribute, module, parameter)
            with torch.no_grad():
                parameter.sub_(self.rate * self.moments[i] / (bias_correction * divisor))
        return loss


# ---- the networks with known numbers


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


def waves(shape, factor):
    count = math.prod(shape)
    values = [0.5 * math.sin(0.7 * factor * k) for k in range(1, count + 1)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


TARGET = torch.tensor([0, 1])
ROWS = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
IMAGES = torch.arange(18, dtype=torch.float64).cos().reshape(2, 1, 3, 3)


def linear_network():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(waves((2, 3), 1))
        model[0].bias.copy_(torch.tensor([0.1, -0.2], dtype=torch.float64))
    return model, lambda net: functional.cross_entropy(net(ROWS), TARGET)


def convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), Mean(), nn.Linear(2, 2)
    ).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters(), start=1):
            parameter.copy_(waves(parameter.shape, index))
    return model, lambda net: functional.cross_entropy(net(IMAGES), TARGET)
