"""Small images on the device: read once by pyarrow, augmented where they lie, channels last."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch
from regrad_runner.models.residual import Norm
from regrad_runner.workloads.decode import EncodedImage, common_format, decode_images
from regrad_runner.workloads.images import (
    Augmentation,
    ImageSet,
    ImageWorkload,
    LabelledImages,
    standardized,
)
from regrad_runner.workloads.samples import Batch, hashed_integers
from regrad_runner.workloads.split import validation_and_training
from regrad_runner.workloads.workload import Defaults, Measure
from torch import Tensor, nn

LOOKED_AT = 100  # images that the common size is chosen by, as workload parquet does
# Names a folder for what is decoded. Its processes must trust each other.
CACHE = "REGRAD_ON_DEVICE_CACHE"
LARGEST_BATCH = 2500  # images in one forward pass of an evaluation


def load(
    *, seed_of_split: int = 0, data_dir: Path | None = None, train_size: int | None = None
) -> ImagesOnDevice:
    """Return the images of `train.parquet` and `test.parquet`, on the accelerator if there is one.

    Splits, augmentation and batches are those of workload `parquet`, number by number. What differs
    is where they are made, and that nothing of Hugging Face is imported.

    Args:
        seed_of_split: Fixes which images validate and which are kept, at least 0.
        data_dir: Folder with the two files, whose columns are `image` (a struct with `bytes`) and
            `label` (classes from 0).
        train_size: Number of training images to keep after the validation split; None for all.

    Raises:
        ValueError: If a file is missing, or the images are too few.
    """
    pixels, labels = _decoded(data_dir, "train")
    validation, train = validation_and_training(labels.numpy(), train_size, seed=seed_of_split)
    sets = standardized(
        (pixels[train], labels[train]),
        (pixels[validation], labels[validation]),
        _decoded(data_dir, "test"),
        augment=Augmentation(shift=pixels.shape[2] // 8, flip=True),
    )
    device = _device()
    train_set, validation_set, test_set = (ImageSetOnDevice(images, device) for images in sets)
    return ImagesOnDevice(
        name="on-device",
        measure=Measure(),
        train=train_set,
        validation=validation_set,
        test=test_set,
        classes=int(labels.max()) + 1,
        defaults=Defaults(
            epochs=30, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, model="resnet20"
        ),
    )


def _device() -> torch.device:
    """Return the accelerator that this process computes on, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _decoded(folder: Path | None, split: str) -> Batch:
    """Return a split's pixels, uint8, shape [N, C, H, W], and labels [N].

    Where the environment names a folder for it, they are decoded once for all processes.
    """
    if folder is None:
        raise ValueError("data_dir must be a folder with train.parquet and test.parquet, got None")
    source = folder / f"{split}.parquet"
    if not source.is_file():
        raise ValueError(f"data_dir must hold {source.name}, got '{folder}' without it")
    if CACHE not in os.environ:
        return _decode(source)
    kept = Path(os.environ[CACHE]) / f"{split}.pt"
    if not kept.is_file():
        aside = kept.with_suffix(f".{os.getpid()}")
        torch.save(_decode(source), aside)
        aside.replace(kept)
    pixels, labels = torch.load(kept)
    return pixels, labels


def _decode(path: Path) -> Batch:
    """Read a file and decode its images."""
    table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    contents = table["image"].combine_chunks().field("bytes").to_pylist()
    images = [
        EncodedImage(where=f"row {row} of {path.name}", content=content)
        for row, content in enumerate(contents)
    ]
    pixels = decode_images(images, common_format(images[:LOOKED_AT]))
    return pixels, torch.from_numpy(table["label"].to_numpy().astype(np.int64))


class ImageSetOnDevice(LabelledImages):
    """Labelled images that lie on a device and are augmented there, in the format channels last.

    Args:
        images: The same images on the CPU: batch for batch these have the same numbers.
        device: Where they lie from now on.
    """

    evaluation_batch = LARGEST_BATCH

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        super().__init__(
            images.labels.to(device), channels=images.channels, image_size=images.image_size
        )
        augment = images.augment or Augmentation()
        padded = torch.nn.functional.pad(images.images, (augment.shift,) * 4)
        self.augment = augment
        self.device = device
        self.padded = padded.flatten(2).to(device)
        self.mean = images.mean.to(device)
        self.std = images.std.to(device)
        self.column = torch.arange(images.image_size, device=device)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the images [B, C, H, W], float32, channels last, and labels [B] of these samples.

        One small tensor goes to the device, and nothing is waited for.
        """
        numbers = torch.stack([torch.as_tensor(indices), *self._draws(np.asarray(indices))])
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        chosen, down, right, mirrored = numbers.to(self.device, non_blocking=True)
        return self._augmented(chosen, down, right, mirrored), self.labels[chosen]

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images alone."""
        return self.__getitems__(indices)[0]

    def _draws(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        """Return each image's shift down, shift to the right, and whether it is mirrored."""
        shift = self.augment.shift
        if not shift and not self.augment.flip:
            return [torch.zeros(len(indices), dtype=torch.int64)] * 3
        highs = (2 * shift + 1, 2 * shift + 1, 2 if self.augment.flip else 1)
        return [
            hashed_integers(high, seed=self.seed, epoch=self.epoch, indices=indices, draw=draw)
            for draw, high in enumerate(highs)
        ]

    def _augmented(self, chosen: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
        """Return images, shifted and mirrored, standardised."""
        size = self.image_size
        rows = self.column + down[:, None]
        columns = torch.where(mirrored[:, None] > 0, size - 1 - self.column, self.column)
        columns = columns + right[:, None]
        places = rows[:, :, None] * (size + 2 * self.augment.shift) + columns[:, None, :]
        places = places.reshape(len(chosen), 1, -1).expand(-1, self.channels, -1)
        pixels = self.padded[chosen].gather(2, places)
        images = pixels.reshape(len(chosen), self.channels, size, size).float()
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std


@dataclass(frozen=True, kw_only=True)
class ImagesOnDevice(ImageWorkload):
    """Labelled images on the device, and models in the format channels last."""

    def build_model(
        self, name: str, *, width: int | None = None, norm: Norm = "batch", seed: int = 0
    ) -> nn.Module:
        """Return a classifier of these images, its weights in the format channels last."""
        model = super().build_model(name, width=width, norm=norm, seed=seed)
        return model.to(memory_format=torch.channels_last)
