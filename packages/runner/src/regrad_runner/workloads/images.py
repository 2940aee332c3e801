"""Sets of labelled images, and loaders whose batches do not depend on what is trained on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = tuple[Tensor, Tensor]
Sample = TypeVar("Sample")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        shift: Largest shift in pixels, in each direction and in both axes; what moves in is zero (black). The same
            as a random crop from the image padded by `shift`.
        flip: Whether half of the images are mirrored left to right.
    """

    shift: int = 0
    flip: bool = False


class LabelledImages(Dataset[Batch]):
    """Labelled images of one size, normalised and augmented when a batch is asked for; a subclass says how.

    The augmentation of a sample is a function of (seed, epoch, index of the sample) alone: not of the batch it is
    in, the process, the order, or anything drawn before. It draws no global random number.

    Args:
        labels: Classes from 0, int64, shape [N].
        channels: Channels of every image.
        image_size: Height and width in pixels; the images of this project's workloads are square.
        seed: Of the augmentation, at least 0.
    """

    def __init__(self, labels: Tensor, *, channels: int, image_size: int, seed: int = 0) -> None:
        self.labels = labels
        self.channels, self.image_size = channels, image_size
        self.seed, self.epoch = seed, 0

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images [B, C, H, W], float32, normalised and augmented. A subclass must implement it."""
        raise TypeError(f"{type(self).__name__} must implement pixels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the images [B, C, H, W], float32, and labels [B] of these samples, made in one go."""
        return self.pixels(indices), self.labels[torch.as_tensor(indices)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn, from 0."""
        self.epoch = epoch

    def with_seed(self, seed: int) -> Self:
        """Return a view of the same images with an augmentation seed and an epoch of its own."""
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed!r}")
        view = copy.copy(self)
        view.seed, view.epoch = seed, 0
        return view

    def batches(self, size: int = 512, *, indices: Sequence[int] | None = None, workers: int = 0) -> Iterator[Batch]:
        """Yield samples in order, at most `size` at a time: for evaluation.

        Args:
            size: Samples at once, at least 1.
            indices: Which samples; None for each of them once.
            workers: Processes that make the batches; 0 for this one alone.
        """
        chosen = list(range(len(self)) if indices is None else indices)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        generator = torch.Generator()  # an iteration draws one number; without this, a global one
        yield from DataLoader(self, batch_sampler=parts, collate_fn=_identity, num_workers=workers, generator=generator)


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
        >>> images = ImageSet(pixels, torch.tensor([3]), mean=torch.tensor([100.0]), std=torch.tensor([50.0]))
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
            raise ValueError(f"images must be uint8 of shape [N, C, H, W], got {images.dtype} {list(images.shape)}")
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
            images = _augmented(images, self.augment, seed=self.seed, epoch=self.epoch, indices=chosen.numpy())
        return (images.float() - self.mean) / self.std


def standardized(
    train: Batch, validation: Batch, test: Batch, *, augment: Augmentation
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the three sets, scaled by the training pixels' moments per channel; the first is augmented.

    Args:
        train: Raw pixels, uint8, shape [N, C, H, W], and labels [N].
        validation: The same for the validation split.
        test: The same for the test split.
        augment: Random changes of the training images.
    """
    mean, std = _moments(train[0])
    augments = (augment, None, None)
    first, second, third = (
        ImageSet(images, labels, mean=mean, std=std, augment=change)
        for (images, labels), change in zip((train, validation, test), augments, strict=True)
    )
    return first, second, third


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of uint8 images [N, C, H, W], from counts: no float copy is made."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = shares @ levels
    std = ((levels - mean[:, None]).square() * shares).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


class EpochSampler(Sampler[int]):
    """All samples of a set in an order that is a function of (seed, epoch) alone.

    Args:
        image_set: The set; `set_epoch` reaches it too, so that order and augmentation move together.
        seed: Of the order, at least 0.
    """

    def __init__(self, image_set: LabelledImages, *, seed: int) -> None:
        self.image_set = image_set
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
        self.epoch = epoch
        self.image_set.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng((self.seed, self.epoch)).permutation(len(self.image_set)).tolist()

    def __len__(self) -> int:
        return len(self.image_set)


class TrainingLoader(DataLoader[Batch]):
    """A `torch.utils.data.DataLoader` over an `EpochSampler`, with the `set_epoch` that accelerate's loaders have."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose batches the next iteration yields."""
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)


def training_loader(
    image_set: LabelledImages, *, batch_size: int, seed: int, drop_last: bool = True, workers: int = 0
) -> TrainingLoader:
    """Return a loader whose k-th batch is a function of (seed, epoch, k) alone.

    So batch k is the same in every arm of a comparison, however many random numbers an arm draws; on any number of
    processes (`accelerate.Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))` splits this
    very batch); and after `accelerate.skip_first_batches`. Call `set_epoch(epoch)` on the loader, or on what
    `Accelerator.prepare` made of it, before each epoch and before skipping.

    Args:
        image_set: The training set; the loader works on its own view of it, augmented with `seed`.
        batch_size: Samples per optimizer step over all processes, from 1 to the size of the set.
        seed: Of order and augmentation, at least 0.
        drop_last: Whether samples that do not fill a batch are left out of the epoch.
        workers: Processes that make the batches; 0 for this one alone. The batches are the same.

    Returns:
        A loader of (float images [B, C, H, W], labels [B]).

    Raises:
        ValueError: If the batch size or seed is out of its range.
    """
    if not 1 <= batch_size <= len(image_set):
        raise ValueError(f"batch_size must be from 1 to {len(image_set)} (the training images), got {batch_size!r}")
    view = image_set.with_seed(seed)
    return TrainingLoader(
        view,
        batch_size=batch_size,
        sampler=EpochSampler(view, seed=seed),
        drop_last=drop_last,
        collate_fn=_identity,
        num_workers=workers,
        generator=torch.Generator(),  # each iteration draws one number; without this, a global one
    )


def _identity(batch: Sample) -> Sample:
    return batch


def _augmented(
    images: Tensor, augment: Augmentation, *, seed: int, epoch: int, indices: npt.NDArray[np.int64]
) -> Tensor:
    count, channels, height, width = images.shape
    draws = [
        _integers(high, seed=seed, epoch=epoch, indices=indices, draw=draw)
        for draw, high in enumerate((2 * augment.shift + 1, 2 * augment.shift + 1, 2 if augment.flip else 1))
    ]
    down, right, mirrored = (draw[:, None] for draw in draws)
    column = torch.arange(width)
    rows = torch.arange(height) + down
    columns = torch.where(mirrored > 0, width - 1 - column, column) + right
    padded = torch.nn.functional.pad(images, (augment.shift,) * 4)
    # One gather for shift and mirror; three times as fast as indexing with four tensors.
    pixels = rows[:, :, None] * (width + 2 * augment.shift) + columns[:, None, :]
    chosen = pixels.reshape(count, 1, -1).expand(count, channels, -1)
    return padded.reshape(count, channels, -1).gather(2, chosen).reshape(images.shape)


def _integers(high: int, *, seed: int, epoch: int, indices: npt.NDArray[np.int64], draw: int) -> Tensor:
    """Return one integer in [0, high) per index, int64: a hash of (seed, epoch, draw, index).

    References:
        Steele, Lea and Flood, 2014, "Fast Splittable Pseudorandom Number Generators", figure 17 (SplitMix64).
    """
    key = np.random.SeedSequence((seed, epoch, draw)).generate_state(1, np.uint64)
    bits = key + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    # The upper 32 bits as a fraction of 2^32: the bias is below high / 2^32.
    return torch.from_numpy((((bits >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64))
