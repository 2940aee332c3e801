"""torchvision's classifiers by name, initialised without touching the global random state."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

SIZES_TO_SUGGEST = (16, 28, 32, 48, 64, 75, 96, 128, 160, 192, 224, 256, 299)
BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMALISATIONS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm)


def classifier_names() -> list[str]:
    """Return the names of torchvision's classifiers, sorted."""
    return sorted(models.list_models(module=models))


def build_classifier(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    group_norm: Any = None,
    bare: bool = False,
    seed: int,
) -> nn.Module:
    """Return a classifier of torchvision, without pretrained weights and without auxiliary outputs.

    It is initialised as torchvision does, from `seed`. No global random number is drawn. Grey
    images are repeated to the three channels that all of them expect.

    Args:
        name: One of `classifier_names`.
        classes: Number of outputs.
        channels: Channels of the images, 1 or 3.
        image_size: Height and width of the images in pixels.
        group_norm: Makes, from a number of channels, what is put in place of every batch
            normalisation; None leaves them.
        bare: Whether a network with any normalisation is refused.
        seed: Fixes the initial weights.

    Returns:
        The model in training mode, on the CPU: images [B, channels, image_size, image_size] to
        logits [B, classes].

    Raises:
        ValueError: If the channels, the size of the images or the normalisation do not fit this
            classifier.

    Example:
        >>> model = build_classifier(
        ...     "mobilenet_v3_small", classes=7, channels=1, image_size=32, seed=0
        ... )
        >>> model(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 7])
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3 for model {name!r}, got {channels!r}")
    network = _seeded(name, classes, seed)
    if bare and any(_of_kind(network, NORMALISATIONS)):
        raise ValueError(
            f"norm must be 'batch' or 'group' for model {name!r}, got 'none'; "
            "it cannot be left out there, and only resnet8, resnet20, resnet32 and resnet56 have "
            "an initialisation that does without"
        )
    if group_norm is not None:
        network = _with_groups(name, network, group_norm, classes, seed)
    model = network if channels == 3 else GreyImages(network)
    _check_size(name, model, channels, image_size)
    return model


class GreyImages(nn.Module):
    """A network for colour images that is given grey ones: their channel is repeated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, 1, H, W]."""
        return self.network(images.expand(-1, 3, -1, -1))  # type: ignore[no-any-return]


def _seeded(name: str, classes: int, seed: int, **options: Any) -> nn.Module:
    """Return a classifier whose weights a seed fixes."""
    fixed = {"aux_logits": False, "init_weights": True}
    options |= {key: value for key, value in fixed.items() if key in _parameters(name)}
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the generators of all devices as well.
        torch.default_generator.manual_seed(seed)
        network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return network


def _parameters(name: str) -> typing.Mapping[str, inspect.Parameter]:
    """Return what a classifier's constructor takes, which its builder hides behind **kwargs."""
    kind = typing.get_type_hints(models.get_model_builder(name))["return"]
    return inspect.signature(kind).parameters


def _with_groups(
    name: str, network: nn.Module, group_norm: Any, classes: int, seed: int
) -> nn.Module:
    """Return the network again, with group in place of batch normalisation."""
    refusal = f"norm must be 'batch' for model {name!r}, got 'group'; "
    if not any(_of_kind(network, BATCH_NORM)):
        raise ValueError(f"{refusal}it has no batch normalisation and does not mix samples")
    if "norm_layer" not in _parameters(name):
        raise ValueError(f"{refusal}its constructor in torchvision accepts no other")
    try:
        network = _seeded(name, classes, seed, norm_layer=group_norm)
    except TypeError as problem:  # the builder passes one of its own
        raise ValueError(f"{refusal}its constructor in torchvision sets its own") from problem
    if any(_of_kind(network, BATCH_NORM)):
        raise ValueError(f"{refusal}its constructor in torchvision replaces only some of them")
    return network


def _of_kind(network: nn.Module, kind: Any) -> Iterator[bool]:
    """Yield for every module whether it is of a kind."""
    return (isinstance(module, kind) for module in network.modules())


def _check_size(name: str, model: nn.Module, channels: int, size: int) -> None:
    """Raise a `ValueError` that suggests another size if images of this one do not go through."""
    if _takes(model, channels, size):
        return
    fitting = (other for other in SIZES_TO_SUGGEST if _takes(model, channels, other))
    suggested = next(fitting, "none that was tried")
    raise ValueError(f"image_size must fit model {name!r}, such as {suggested}, got {size}")


def _takes(model: nn.Module, channels: int, size: int) -> bool:
    """Say whether images of this size go through; only shapes are computed, without content."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    images = torch.empty(2, channels, size, size, device="meta")
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, shapes, (images,))
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        model.train()
    return True
