"""Models that return several outputs: their criterion, their predictions, and what these cost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from regrad_runner.models.residual import MultiExitNetwork


def exits_of(model: nn.Module) -> int:
    """Return how many answers a model gives: its attribute `exits`, else 1.

    Example:
        >>> exits_of(nn.Linear(2, 3))
        1
    """
    return int(getattr(model, "exits", 1))


class SumOverExits(nn.Module):
    """The plain sum of the exits' losses.

    Args:
        exit_criterion: The loss of one exit. Corrections of models with several exits find it by
            this name.

    Example:
        >>> outputs = (torch.zeros(1, 2), torch.zeros(1, 2))
        >>> SumOverExits(nn.CrossEntropyLoss())(outputs, torch.tensor([0]))
        tensor(1.3863)
    """

    def __init__(self, exit_criterion: nn.Module) -> None:
        super().__init__()
        self.exit_criterion = exit_criterion

    def forward(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the sum over the exits."""
        total: Tensor = self.exit_criterion(outputs[0], targets)
        for output in outputs[1:]:
            total = total + self.exit_criterion(output, targets)
        return total


def predictions(criterion: Any, outputs: Any) -> list[Tensor]:
    """Return the logits that each exit predicts with.

    Args:
        criterion: Of the run. If it was corrected so that exits predict with something else than
            their outputs, its method `predictions` returns that.
        outputs: What the model returned: logits, or a tuple of them.

    Example:
        >>> len(predictions(nn.CrossEntropyLoss(), torch.zeros(1, 2)))
        1
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    as_predicted = getattr(criterion, "predictions", None)
    return list(outputs) if as_predicted is None else list(as_predicted(outputs))


@torch.no_grad()
def multiply_adds(model: MultiExitNetwork, images: Tensor) -> list[int]:
    """Return what the answer of each exit costs, in multiply-adds of one image.

    Convolutions and linear layers are counted, as is usual; the heads of earlier exits too, since
    their answers decide whether to go on.

    Args:
        model: Not changed.
        images: One image, shape [1, C, H, W].

    Returns:
        One number per exit, increasing.

    Example:
        >>> from regrad_runner.models.building import build_model
        >>> model = build_model("multiexit8", classes=10, channels=1, image_size=8, width=4)
        >>> multiply_adds(model, torch.zeros(1, 1, 8, 8))
        [20776, 34680, 48664]
    """
    counted = copy.deepcopy(model).cpu().eval()
    counts: dict[nn.Module, int] = {}

    def note(module: Any, _: Any, output: Tensor) -> None:
        # every output is the sum of as many products as an output of the layer has weights
        per_output = module.weight[0].numel()
        counts[module] = output.numel() * per_output

    for module in counted.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    counted(images.cpu())
    total = 0
    costs: list[int] = []
    for part in counted.parts:
        for module in nn.ModuleList(part).modules():
            total += counts.get(module, 0)
        costs.append(total)
    return costs
