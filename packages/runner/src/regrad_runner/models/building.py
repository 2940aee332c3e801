"""Models by name, initialised without touching the global random state: residual networks for small images here."""

from __future__ import annotations

import math
import typing
from typing import Literal

import torch
from regrad.correction import did_you_mean
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]

BLOCKS_PER_STAGE = {f"resnet{6 * blocks + 2}": blocks for blocks in (1, 3, 5, 9)}
MODELS = tuple(BLOCKS_PER_STAGE)
GROUPS = 8


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

    A CIFAR network is a convolution, three stages of n blocks, an average and a linear layer.
    The depth 6n + 2 is in the name. Stage k has `width` · 2ᵏ channels, k = 0, 1, 2, and halves the image where
    k > 0. Shortcuts have no parameters (option A). Convolutions and the output layer start from a normal
    distribution with variance 2 / fan-in, biases from zero, normalisations from the identity.

    torchvision's classifiers come without pretrained weights and auxiliary outputs, initialised as torchvision does;
    those that expect colour are given grey images with their channel repeated.

    Args:
        name: "resnet8", "resnet20", "resnet32", "resnet56", or one of `torchvision.models.list_models`, of its
            classifiers.
        classes: Number of outputs, at least 2.
        channels: Channels of the images, at least 1.
        image_size: Height and width of the images in pixels, at least 4: what three stages leave of less is empty.
            torchvision's have other bounds.
        width: Channels of the first stage, at least 1; None for the paper's 16. torchvision's have widths of their
            own, and must be given None.
        norm: "batch", and what torchvision's have of their own; "group" (at most 8 groups), which does not mix the
            samples of a batch; or "none": no normalisation but an initialisation that does without, as the
            references say.
        seed: Fixes the initial weights; two calls with one seed return equal models. No global random number
            is drawn.

    Returns:
        The model in training mode, on the CPU, in float32: images [B, channels, image_size, image_size] to
        logits [B, classes].

    Raises:
        ValueError: If the name or norm is unknown, a number is out of its range, or what is asked does not fit one
            of torchvision's.

    Example:
        >>> model = build_model("resnet8", classes=10, channels=1, image_size=8, seed=0)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in build_model("resnet20", classes=10).parameters())
        269722

    References:
        He, Zhang, Ren and Sun, 2015, "Deep Residual Learning for Image Recognition", section 4.2; for the
        initialisation the same authors, 2015, "Delving Deep into Rectifiers", equation 10. Theirs draws from no
        named generator; here each model has its own.

        Without normalisation: De and Smith, 2020, "Batch Normalization Biases Residual Blocks Towards the Identity
        Function in Deep Networks", section 4 (SkipInit): convolutions have biases, and every residual branch ends
        in a learned factor that starts small. Of the values that they allow ours starts at :math:`1/\sqrt{d}` with
        d blocks, where gradients reach every layer from the first step, not at 0. The last convolution of a branch,
        which no rectifier follows, has variance 1 / fan-in, so that a block adds 1/d of its input's second moment
        and all d together at most a factor e. Their branches start with a rectifier, ours rectifies after the sum.
    """
    if norm not in typing.get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(typing.get_args(Norm))}, got {norm!r}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes!r}")
    shape: dict[str, int] = {
        "classes": classes,
        "channels": channels,
        "image_size": image_size,
        "seed": seed,
    }
    if is_own(name):
        return _residual_network(name, width=16 if width is None else width, norm=norm, **shape)
    from regrad_runner.models import torchvision as classifiers  # noqa: PLC0415 - torchvision takes a second to load

    if name not in (known := classifiers.classifier_names()):
        near = did_you_mean(name, [*MODELS, *known])
        raise ValueError(
            f"no model named {name!r}; there are {', '.join(MODELS)} and torchvision's classifiers{near}"
        )
    if width is not None:
        raise ValueError(
            f"width must be left out for model {name!r}, whose widths are fixed, got {width!r}"
        )
    return classifiers.build_classifier(
        name, **shape, group_norm=group_norm if norm == "group" else None, bare=norm == "none"
    )


def is_own(name: str) -> bool:
    """Say whether a name is that of a CIFAR residual network, whose width can be chosen."""
    return name in BLOCKS_PER_STAGE


def _residual_network(
    name: str, *, width: int, norm: Norm, classes: int, channels: int, image_size: int, seed: int
) -> nn.Module:
    for what, value, least in (
        ("channels", channels, 1),
        ("image_size", image_size, 4),
        ("width", width, 1),
    ):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, got {value!r}")
    # Modules draw their default weights when they are made; the fork puts the global state back.
    with torch.random.fork_rng(devices=[]):
        model = ResidualNetwork(
            BLOCKS_PER_STAGE[name], classes=classes, channels=channels, width=width, norm=norm
        )
    _initialize(model, torch.Generator().manual_seed(seed))
    return model


def head_of(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return the output layer: the last `torch.nn.Linear` that the model registered.

    Where there is none it is the last convolution, as in SqueezeNet. Seen to hold for every classifier of torchvision.

    Args:
        model: Any module with such an output layer, bare or wrapped (DDP).

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: If the model has neither.

    Example:
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
    names = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is own for own in head)
    ]
    if len(names) > len(head):
        shared = " and ".join(
            name for name, parameter in names if sum(parameter is p for _, p in names) > 1
        )
        raise ValueError(
            f"head must have weights of its own for {whose}, got one tensor as {shared}; "
            "untie them, or leave controls out (--no-controls)"
        )
    return head


class ResidualNetwork(nn.Module):
    """The network that `build_model` returns; `fc` is its output layer."""

    def __init__(self, blocks: int, *, classes: int, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(3)]
        self.conv = _conv3x3(channels, width, bias=norm == "none")
        self.norm = _norm(norm, width)
        self.stages = nn.Sequential()
        previous = width
        for index, current in enumerate(widths):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(
                    ResidualBlock(previous, current, stride=stride, norm=norm, depth=3 * blocks)
                )
                previous = current
            self.stages.append(stage)
        self.fc = nn.Linear(previous, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, C, H, W]."""
        features = self.stages(torch.relu(self.norm(self.conv(images))))
        return self.fc(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside an identity shortcut, one of `depth` such blocks in a row."""

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int, norm: Norm, depth: int = 1
    ) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = _conv3x3(channels_in, channels_out, stride=stride, bias=bias)
        self.norm1 = _norm(norm, channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, bias=bias)
        self.norm2 = Scale(1 / math.sqrt(depth)) if norm == "none" else _norm(norm, channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, channels_out, ⌈H / stride⌉, ⌈W / stride⌉] of features [B, channels_in, H, W]."""
        residual = torch.relu(self.norm1(self.conv1(images)))
        residual = self.norm2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(images))

    def shortcut(self, images: Tensor) -> Tensor:
        """Return every `stride`-th pixel, with zeros as the channels that the input does not have (option A)."""
        if self.stride > 1:
            images = images[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            images = nn.functional.pad(images, (0, 0, 0, 0, 0, self.new_channels))
        return images


class Scale(nn.Module):
    """One learned factor, where a residual branch without normalisation ends."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of any shape times the factor."""
        return features * self.factor


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation of the most groups, at most 8, that divide the channels alike."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _conv3x3(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if norm == "batch" else group_norm(channels)


@torch.no_grad()
def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResidualBlock) and isinstance(module.norm2, Scale):
            module.conv2.weight.mul_(
                math.sqrt(0.5)
            )  # no rectifier follows that would halve the second moment
