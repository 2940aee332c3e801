"""ResNet-50's tensors with gradients of a chosen size, and models of a chosen size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

HEAD = "fc"
WIDTH = 1024
OUTPUTS = 10


class Gradients:
    """A model whose parameters have gradients that can be restored.

    Args:
        model: Overwritten with random weights.
        relative_size: Size of a gradient's elements in those of its weights.

    Attributes:
        model: The model.
        parameters: Its parameters.
    """

    def __init__(self, model: nn.Module, *, relative_size: float) -> None:
        self.model, self.parameters = model, list(model.parameters())
        generator = torch.Generator(self.parameters[0].device).manual_seed(0)
        self._originals: list[Tensor] = []
        with torch.no_grad():
            for parameter in self.parameters:
                size = max(1, parameter[0].numel()) ** -0.5
                parameter.normal_(std=size, generator=generator)
                parameter.grad = torch.empty_like(parameter)
                self._originals.append(
                    torch.empty_like(parameter).normal_(
                        std=size * relative_size, generator=generator
                    )
                )
        self.refill()

    def refill(self, factor: float = 1.0) -> None:
        """Restore the gradients, times `factor`."""
        torch._foreach_copy_(self.gradients, self._originals)
        if factor != 1:
            torch._foreach_mul_(self.gradients, factor)

    @property
    def gradients(self) -> list[Tensor]:
        """The live gradients."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def resnet50_gradients(
    device: torch.device, *, quick: bool, relative_size: float = 0.1
) -> Gradients:
    """Return torchvision's ResNet-50, 161 tensors of 25.6 M parameters, or with `quick` a few."""
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict(few_layers())) if quick else resnet50()
    return Gradients(model.to_empty(device=device), relative_size=relative_size)


def few_layers() -> dict[str, nn.Module]:
    """Return a convolution, a norm and a head, by the names that ResNet-50 has for its own."""
    return {
        "conv1": nn.Conv2d(3, 8, 3, bias=False),
        "bn1": nn.BatchNorm2d(8),
        HEAD: nn.Linear(8, 4),
    }


def square_layers(millions: int, device: torch.device, *, quick: bool) -> Gradients:
    """Return linear layers with gradients, and a head of ten outputs after them.

    Some corrections leave the head alone: without one the only layer of a small model would be it.

    Args:
        millions: How many layers of 1024 × 1024 weights.
        device: Where.
        quick: Take at most four layers, of 8 × 8 weights.
    """
    width = WIDTH
    count = millions
    if quick:
        width = 8
        count = min(millions, 4)
    layers = [nn.Linear(width, width, bias=False, device="meta") for _ in range(count)]
    layers.append(nn.Linear(width, OUTPUTS, bias=False, device="meta"))
    return Gradients(nn.Sequential(*layers).to_empty(device=device), relative_size=0.1)


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    r"""Return the largest :math:`\|A_i - B_i\|/\|B_i\|` of n pairs of tensors.

    Example:
        >>> largest_difference([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])])
        0.1714...
    """
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(
        float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
        for a, b in pairs
    )
