"""Models by name, initialised without touching the global random state."""

from __future__ import annotations

import typing

from regrad.correction import did_you_mean
from torch import nn

from regrad_runner.models.residual import (
    BLOCKS_BETWEEN_EXITS,
    BLOCKS_PER_STAGE,
    Norm,
    group_norm,
    is_own,
    residual_network,
)

MODELS = (*BLOCKS_PER_STAGE, *BLOCKS_BETWEEN_EXITS)


def build_model(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    image_size: int = 32,
    width: int | None = None,
    norm: Norm = "batch",
    seed: int = 0,
) -> nn.Module:
    r"""Return a CIFAR residual network, or a classifier of torchvision.

    A CIFAR network is a convolution, three stages of n blocks, an average and a linear layer. The
    depth 6n + 2 is in the name. Stage k has `width` · 2ᵏ channels, k = 0, 1, 2, and halves the
    image where k > 0. Shortcuts have no parameters (option A). Convolutions and the output layer
    start from a normal distribution with variance 2 / fan-in, biases from zero, normalisations from
    the identity.

    torchvision's classifiers come without pretrained weights and auxiliary outputs, initialised as
    torchvision does; those that expect colour are given grey images with their channel repeated.

    Args:
        name: "resnet8", "resnet20", "resnet32", "resnet56"; "multiexit8" and so on, the same with
            an average and a linear layer after every stage, of which it returns all; or one of
            `torchvision.models.list_models`, of its classifiers.
        classes: Number of outputs, at least 2.
        channels: Channels of the images, at least 1.
        image_size: Height and width of the images in pixels, at least 4: what three stages leave of
            less is empty. torchvision's have other bounds.
        width: Channels of the first stage, at least 1; None for the paper's 16. torchvision's have
            widths of their own, and must be given None.
        norm: "batch", and what torchvision's have of their own; "group" (at most 8 groups), which
            does not mix the samples of a batch; or "none": no normalisation but an initialisation
            that does without, as the references say.
        seed: Fixes the initial weights; two calls with one seed return equal models. No global
            random number is drawn.

    Returns:
        The model in training mode, on the CPU, in float32: images [B, channels, image_size,
        image_size] to logits [B, classes], "multiexit8" and so on to a tuple of three.

    Raises:
        ValueError: If the name or norm is unknown, a number is out of its range, or what is asked
            does not fit one of torchvision's.

    Example:
        >>> import torch
        >>> model = build_model("resnet8", classes=10, channels=1, image_size=8, seed=0)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in build_model("resnet20", classes=10).parameters())
        269722

    References:
        He, Zhang, Ren and Sun, 2015, "Deep Residual Learning for Image Recognition", section 4.2;
        for the initialisation the same authors, 2015, "Delving Deep into Rectifiers", equation 10.
        Theirs draws from no named generator; here each model has its own.

        Without normalisation: De and Smith, 2020, "Batch Normalization Biases Residual Blocks
        Towards the Identity Function in Deep Networks", section 4 (SkipInit): convolutions have
        biases, and every residual branch ends in a learned factor that starts small. Of the values
        that they allow ours starts at :math:`1/\sqrt{d}` with d blocks, where gradients reach every
        layer from the first step, not at 0. The last convolution of a branch, which no rectifier
        follows, has variance 1 / fan-in, so that a block adds 1/d of its input's second moment and
        all d together at most a factor e. Their branches start with a rectifier, ours rectifies
        after the sum.
    """
    norms = typing.get_args(Norm)
    if norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, got {norm!r}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes!r}")
    shape: dict[str, int] = {
        "classes": classes,
        "channels": channels,
        "image_size": image_size,
        "seed": seed,
    }
    if is_own(name):
        return residual_network(name, width=16 if width is None else width, norm=norm, **shape)
    # Imported here, because torchvision takes a second to load.
    from regrad_runner.models import torchvision as classifiers  # noqa: PLC0415

    known = classifiers.classifier_names()
    if name not in known:
        near = did_you_mean(name, [*MODELS, *known])
        raise ValueError(
            f"no model named {name!r}; "
            f"there are {', '.join(MODELS)} and torchvision's classifiers{near}"
        )
    if width is not None:
        raise ValueError(
            f"width must be left out for model {name!r}, whose widths are fixed, got {width!r}"
        )
    return classifiers.build_classifier(
        name, **shape, group_norm=group_norm if norm == "group" else None, bare=norm == "none"
    )
