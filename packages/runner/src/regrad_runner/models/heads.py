"""The output layer of a model."""

from __future__ import annotations

from torch import nn


def head_of(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return the output layer: the last `torch.nn.Linear` that the model registered.

    Where there is none it is the last convolution, as in SqueezeNet. Seen to hold for every
    classifier of torchvision.

    Args:
        model: Any module with such an output layer, bare or wrapped (DDP).

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: If the model has neither.

    Example:
        >>> from regrad_runner.models.building import build_model
        >>> head_of(build_model("resnet8", classes=10))
        Linear(in_features=64, out_features=10, bias=True)
    """
    for kind in (nn.Linear, nn.Conv2d):
        layers = [module for module in model.modules() if isinstance(module, kind)]
        if layers:
            return layers[-1]
    raise ValueError(
        f"model must have a linear output layer, got {type(model).__name__} without one"
    )


def own_head(model: nn.Module, *, whose: str) -> list[nn.Parameter]:
    """Return the parameters of the output layer, to be changed without the rest of the model.

    Args:
        model: As for `head_of`.
        whose: What is to change them, as an error calls it.

    Raises:
        ValueError: If the model has no such layer, or another layer holds its weights too.
    """
    head = list(head_of(model).parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    for own in head:
        names = [name for name, parameter in named if parameter is own]
        if len(names) > 1:
            raise ValueError(
                f"head must have weights of its own for {whose}, "
                f"got one tensor as {' and '.join(names)}; "
                "untie them, or leave controls out (--no-controls)"
            )
    return head
