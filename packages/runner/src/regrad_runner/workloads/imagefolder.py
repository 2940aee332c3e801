"""Folders of image files with one subfolder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from regrad_runner.workloads.decode import (
    IMAGES_LOOKED_AT,
    LARGEST_SIDE,
    SMALLEST_SIDE,
    Format,
    ImageFile,
    common_format,
    decode_images,
)
from regrad_runner.workloads.files import FileSet
from regrad_runner.workloads.folders import DataFolder
from regrad_runner.workloads.images import Augmentation, ImageWorkload, LabelledImages, standardized
from regrad_runner.workloads.samples import Batch
from regrad_runner.workloads.split import Indices, keep_stratified, validation_and_training
from regrad_runner.workloads.workload import Defaults, Measure

# Of the files that stay on disk: takes a second; more could take minutes on a network disk.
OPENED = 10_000
MOST_BYTES = 8 * 2**30
IMAGE_LAYOUT = (
    "a folder with train and val, or train and test, each with a folder of images per class"
)
# Up to so many training images, use a small network, in batches small enough for some steps.
FEW_IMAGES = 2_000
FEWEST_STEPS_PER_EPOCH = 8
BATCHES_OF_FEW = (64, 32, 16, 8)
RATE_OF_FEW = 0.05  # as for the digits: 100 of them train well with it in batches of 8
SMALL_DEFAULTS = Defaults(
    epochs=30, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, model="resnet20"
)
LARGE_DEFAULTS = Defaults(
    epochs=90, batch_size=256, lr=0.1, momentum=0.9, weight_decay=1e-4, model="resnet18"
)


def load(
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    image_size: int | None = None,
) -> ImageWorkload:
    """Return the images under `train` and `val` or `test`, with a folder per class, like ImageNet.

    Classes are the folders of `train`, numbered in sorted order. Images are the files below them
    whose names end as images do. Hidden files, such as `.ipynb_checkpoints`, are not. A
    link that leads out of `data_dir` is refused, and so is a file or folder that is read twice,
    through a link, a hard link or otherwise. If only one of `val` and `test` exists, it is the test
    split, and a tenth of the training images, but at most `train_size`, is the validation split,
    with the same share of each class. If both exist, `val` is the validation split.

    Up to 64 pixels images are decoded once, into memory, and treated as those of workload
    `parquet`: the shorter side resized, the middle cut out, grey if the first 100 looked at are,
    shifted by up to an eighth and mirrored for training, standardised with the training pixels'
    moments. Larger ones are read from the disk batch by batch and treated as is usual for ImageNet:
    see `regrad_runner.workloads.files.FileSet`. Of these the head is read beforehand of 10,000 in
    each split, so that what is not an image is found before anything is trained.

    Args:
        seed_of_split: Fixes which images validate and which are kept, at least 0.
        data_dir: The folder.
        train_size: Number of training images to keep after the validation split; None for all.
        image_size: Height and width in pixels, at least 4; None for the median shorter side of 100
            training images, but at most 64.

    Small data sets get other settings than large ones: see `defaults_for`.

    Raises:
        ValueError: If a folder, class or image is missing or cannot be read, if there are fewer
            than 2 classes or too few images of one, if what is to be decoded into memory takes more
            than 8 GiB, or if `train_size` or `image_size` is out of its range.
    """
    if image_size is not None and image_size < SMALLEST_SIDE:
        raise ValueError(f"image_size must be at least {SMALLEST_SIDE}, got {image_size!r}")
    folders = _folders(data_dir)
    data = DataFolder(folders["train"].parent)
    all_train = _Split.read(data, folders.pop("train"))
    held = {name: _Split.read(data, folder, all_train.classes) for name, folder in folders.items()}
    test = held.get("test") or held["val"]
    if len(held) == 2:
        validation = held["val"]
        kept = keep_stratified(all_train.labels, train_size, seed=seed_of_split)
    else:
        validating, kept = validation_and_training(all_train.labels, train_size, seed=seed_of_split)
        validation = all_train.only(validating)
    splits = (all_train.only(kept), validation, test)
    if image_size is not None and image_size > LARGEST_SIDE:
        sets = _on_disk(splits, image_size)
        defaults = LARGE_DEFAULTS
    else:
        sets = _in_memory(splits, _format(all_train, image_size))
        defaults = defaults_for(len(kept))
    train_set, validation_set, test_set = sets
    return ImageWorkload(
        name="imagefolder",
        measure=Measure(),
        train=train_set,
        validation=validation_set,
        test=test_set,
        classes=len(all_train.classes),
        defaults=defaults,
    )


def defaults_for(count: int) -> Defaults:
    """Return the settings that suit so many training images of up to 64 pixels.

    More than 2,000 images get those of CIFAR: a ResNet-20 in batches of 128. Fewer get a ResNet-8,
    a learning rate of .05, and the largest batch of 64, 32, 16 or 8 with which an epoch has eight
    steps.

    Args:
        count: Training images, at least 1.

    Example:
        >>> few = defaults_for(90)
        >>> few.model, few.batch_size, few.epochs
        ('resnet8', 8, 30)
        >>> defaults_for(50_000).model
        'resnet20'
    """
    if count > FEW_IMAGES:
        return SMALL_DEFAULTS
    fitting = [size for size in BATCHES_OF_FEW if size * FEWEST_STEPS_PER_EPOCH <= count]
    batch_size = max(fitting, default=min(BATCHES_OF_FEW))
    return replace(
        SMALL_DEFAULTS,
        model="resnet8",
        batch_size=batch_size,
        lr=RATE_OF_FEW,
        reason=(
            f"a small network and batches of {batch_size}, because {count:,} training images are "
            "few; --model, --batch-size, --lr and --epochs change this"
        ),
    )


@dataclass(frozen=True)
class _Split:
    """The image files of one split.

    Attributes:
        paths: Where they are, N.
        labels: Numbers of their classes, int64, shape [N].
        classes: Names of the classes of the training images.
    """

    paths: tuple[Path, ...]
    labels: Indices
    classes: tuple[str, ...]

    @classmethod
    def read(cls, data: DataFolder, folder: Path, classes: tuple[str, ...] = ()) -> _Split:
        """Find the files of a split.

        Args:
            data: Where the folder lies.
            folder: With a folder per class.
            classes: Whose positions are the labels; empty for the classes that are found.
        """
        folders = data.folders(folder)
        if not folders:
            raise ValueError(f"data_dir must be {IMAGE_LAYOUT}, got no folder in '{folder}'")
        classes = classes or tuple(place.name for place in folders)
        if len(classes) < 2:
            raise ValueError(f"'{folder}' must have at least 2 classes, got {classes[0]!r} alone")
        paths: list[Path] = []
        labels: list[int] = []
        for place in folders:
            if place.name not in classes:
                raise ValueError(
                    f"'{folder}' must have the classes of the training images, got {place.name!r}"
                )
            images = data.files(place, _is_image)
            if not images:
                endings = ", ".join(IMG_EXTENSIONS)
                raise ValueError(
                    f"data_dir must be {IMAGE_LAYOUT}, got no image in '{place}'; "
                    f"their names end in {endings}"
                )
            paths += images
            labels += [classes.index(place.name)] * len(images)
        return cls(tuple(paths), np.array(labels, dtype=np.int64), classes)

    def only(self, chosen: Indices) -> _Split:
        """Return the files at these positions."""
        paths = tuple(self.paths[place] for place in chosen.tolist())
        return replace(self, paths=paths, labels=self.labels[chosen])

    def files(self) -> list[ImageFile]:
        """Return what can be decoded."""
        return [ImageFile(path) for path in self.paths]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _folders(data_dir: Path | None) -> dict[str, Path]:
    """Return the folders of the splits that are there: `train`, and `val` or `test` or both."""
    if data_dir is None:
        raise ValueError(f"data_dir must be {IMAGE_LAYOUT}, got None; name it with --data-dir")
    there = {
        name: data_dir / name for name in ("train", "val", "test") if (data_dir / name).is_dir()
    }
    if "train" in there and len(there) > 1:
        return there
    if there:
        got = f"only {', '.join(there)} in it"
    elif data_dir.is_dir():
        got = "none of them in it"
    else:
        got = "no folder"
    raise ValueError(f"data_dir must be {IMAGE_LAYOUT}, got '{data_dir}': {got}")


def _format(train: _Split, image_size: int | None) -> Format:
    """Return the format of images in memory, from files all over the training split."""
    form = common_format(_spread(train.files(), IMAGES_LOOKED_AT))
    return form if image_size is None else replace(form, side=image_size)


def _spread(files: Sequence[ImageFile], count: int) -> list[ImageFile]:
    """Return so many of the files, spread evenly; all of them if there are no more."""
    places = np.unique(np.linspace(0, len(files) - 1, count).astype(int))
    return [files[place] for place in places.tolist()]


def _in_memory(splits: tuple[_Split, _Split, _Split], form: Format) -> tuple[LabelledImages, ...]:
    """Return the images of each split, decoded now."""
    count = sum(len(split.paths) for split in splits)
    size = count * int(np.prod(form.shape))
    if size > MOST_BYTES:
        raise ValueError(
            f"images must take at most {MOST_BYTES / 2**30:g} GiB in memory, "
            f"got {size / 2**30:.1f} ({count:,} of {form.side} pixels); "
            f"use fewer with --train-size, or --image-size above {LARGEST_SIDE}, "
            "which reads them from the disk"
        )

    def batch(split: _Split) -> Batch:
        return decode_images(split.files(), form), torch.from_numpy(split.labels)

    train, validation, test = splits
    augment = Augmentation(shift=form.side // 8, flip=True)
    return standardized(batch(train), batch(validation), batch(test), augment=augment)


def _on_disk(splits: tuple[_Split, _Split, _Split], side: int) -> tuple[LabelledImages, ...]:
    """Return the images of each split, decoded when a batch is requested."""
    for split in splits:
        for file in _spread(split.files(), OPENED):
            file.check()

    def images_of(split: _Split, *, augment: bool) -> FileSet:
        labels = torch.from_numpy(split.labels)
        return FileSet(split.paths, labels, side=side, augment=augment)

    train, validation, test = splits
    return (
        images_of(train, augment=True),
        images_of(validation, augment=False),
        images_of(test, augment=False),
    )
