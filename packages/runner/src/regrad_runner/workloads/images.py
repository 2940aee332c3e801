"""Sets of labelled images, and the workloads that classify them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from regrad_runner.models.building import build_model
from regrad_runner.models.residual import Norm, is_own
from regrad_runner.workloads.samples import Batch, Samples, hashed_integers
from regrad_runner.workloads.workload import Workload

RESNET_WIDTH = 16  # channels of the first stage of a CIFAR network, as in the paper


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        shift: Largest shift in pixels, in each direction and in both axes; what moves in is zero
            (black). The same as a random crop from the image padded by `shift`.
        flip: Whether half of the images are mirrored left to right.
    """

    shift: int = 0
    flip: bool = False


class LabelledImages(Samples):
    """Labelled images of one size, normalised and augmented when a batch is requested.

    A subclass says how, in `pixels`.

    Args:
        labels: Classes from 0, int64, shape [N].
        channels: Channels of every image.
        image_size: Height and width in pixels; the images of this project's workloads are square.
        seed: Of the augmentation, at least 0.
    """

    kind = "images"

    def __init__(self, labels: Tensor, *, channels: int, image_size: int, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.labels = labels
        self.channels = channels
        self.image_size = image_size
        self.work = image_size**2

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images [B, C, H, W], float32, normalised and augmented; to be implemented."""
        raise TypeError(f"{type(self).__name__} must implement pixels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the images [B, C, H, W], float32, and labels [B] of these samples."""
        return self.pixels(indices), self.labels[torch.as_tensor(indices)]


class ImageSet(LabelledImages):
    """Labelled images in memory.

    Args:
        images: Raw pixels, uint8, shape [N, C, H, W].
        labels: Classes from 0, int64, shape [N].
        mean: What is subtracted, in raw pixel units, shape [C].
        std: What is then divided by, in raw pixel units, positive, shape [C].
        augment: Random changes, or None for none.
        seed: Of the augmentation, at least 0.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> pixels = torch.tensor([[[[0, 100], [200, 100]]]], dtype=torch.uint8)
        >>> mean, std = torch.tensor([100.0]), torch.tensor([50.0])
        >>> images = ImageSet(pixels, torch.tensor([3]), mean=mean, std=std)
        >>> images[0]
        (tensor([[[-2.,  0.],
                 [ 2.,  0.]]]), tensor(3))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Tensor,
        std: Tensor,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 of shape [N, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape {[len(images)]}, got {list(labels.shape)}")
        super().__init__(labels, channels=images.shape[1], image_size=images.shape[2], seed=seed)
        self.images = images
        self.mean = mean.reshape(-1, 1, 1)
        self.std = std.reshape(-1, 1, 1)
        self.augment = augment

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images [B, C, H, W], float32, normalised and augmented."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment is not None:
            images = _augmented(
                images, self.augment, seed=self.seed, epoch=self.epoch, indices=chosen.numpy()
            )
        return (images.float() - self.mean) / self.std


def standardized(
    train: Batch, validation: Batch, test: Batch, *, augment: Augmentation
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the three sets, scaled by the training pixels' moments per channel.

    The first one is augmented.

    Args:
        train: Raw pixels, uint8, shape [N, C, H, W], and labels [N].
        validation: The same for the validation split.
        test: The same for the test split.
        augment: Random changes of the training images.
    """
    mean, std = _moments(train[0])
    return (
        ImageSet(*train, mean=mean, std=std, augment=augment),
        ImageSet(*validation, mean=mean, std=std),
        ImageSet(*test, mean=mean, std=std),
    )


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of uint8 images [N, C, H, W].

    They are computed from counts of the 256 levels, without a copy in floating point.
    """
    channels = images.unbind(1)
    counts = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in channels]
    ).double()
    shares = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = shares @ levels
    std = ((levels - mean[:, None]).square() * shares).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _augmented(
    images: Tensor, augment: Augmentation, *, seed: int, epoch: int, indices: npt.NDArray[np.int64]
) -> Tensor:
    """Return images [B, C, H, W], shifted and mirrored as a hash of (seed, epoch, index) says."""
    count, channels, height, width = images.shape
    shifts = 2 * augment.shift + 1
    flips = 2 if augment.flip else 1

    def drawn(high: int, draw: int) -> Tensor:
        numbers = hashed_integers(high, seed=seed, epoch=epoch, indices=indices, draw=draw)
        return numbers[:, None]

    down = drawn(shifts, draw=0)
    right = drawn(shifts, draw=1)
    mirrored = drawn(flips, draw=2)
    column = torch.arange(width)
    rows = torch.arange(height) + down
    columns = torch.where(mirrored > 0, width - 1 - column, column) + right
    padded = torch.nn.functional.pad(images, (augment.shift,) * 4)
    # One gather for shift and mirror; three times as fast as indexing with four tensors.
    pixels = rows[:, :, None] * (width + 2 * augment.shift) + columns[:, None, :]
    chosen = pixels.reshape(count, 1, -1).expand(count, channels, -1)
    return padded.reshape(count, channels, -1).gather(2, chosen).reshape(images.shape)


@dataclass(frozen=True, kw_only=True)
class ImageWorkload(Workload):
    """Labelled images, a classifier, cross entropy and the share of images that are labelled right.

    Attributes:
        train: Training images, augmented.
        validation: Images for tuning and for curves, not augmented.
        test: Images that each run looks at once, not augmented.
        classes: Number of labels.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: int

    def build_model(
        self, name: str, *, width: int | None = None, norm: Norm = "batch", seed: int = 0
    ) -> nn.Module:
        """Return a classifier of these images: see `regrad_runner.models.building.build_model`."""
        shape = {"channels": self.train.channels, "image_size": self.train.image_size}
        return build_model(name, classes=self.classes, width=width, norm=norm, seed=seed, **shape)

    def model_settings(self, name: str) -> Mapping[str, Any]:
        """Return width and normalisation that a model has unless told otherwise."""
        return {"norm": "batch", "width": RESNET_WIDTH if is_own(name) else None}

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the images are labelled right, each counting once."""
        return outputs.argmax(1) == targets, torch.ones_like(targets)
