"""A folder of Hugging Face parquet files with images and labels."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch

from regrad_runner.errors import in_one_line
from regrad_runner.workloads.decode import (
    IMAGES_LOOKED_AT,
    LARGEST_SIDE,
    SMALLEST_SIDE,
    EncodedImage,
    common_format,
    decode_images,
)
from regrad_runner.workloads.folders import DataFolder
from regrad_runner.workloads.images import Augmentation, ImageWorkload, standardized
from regrad_runner.workloads.samples import Batch
from regrad_runner.workloads.split import Indices, keep_stratified, validation_and_training
from regrad_runner.workloads.workload import Defaults, Measure

ROWS_AT_ONCE = 1000
PARQUET_LAYOUT = (
    "a folder with train.parquet and test.parquet, or train-*.parquet and test-*.parquet"
)
PARQUET_DEFAULTS = Defaults(
    epochs=30, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, model="resnet20"
)


def load(
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    image_size: int | None = None,
    test_size: int | None = None,
) -> ImageWorkload:
    """Return the images of a training and a test split in parquet files.

    These are `train.parquet` and `test.parquet`, or `train-*.parquet` and `test-*.parquet`. They
    lie in the folder or in its subfolder `data`, and have the columns `image` (a struct whose
    `bytes` are a file of one of `regrad_runner.workloads.decode.FORMATS`) and `label` (integers or
    strings; classes are numbered in sorted order). A tenth of the training images, but at most
    `train_size`, is the validation split, with the same share of each class.

    Images become square: the shorter side is resized to `image_size`, and the middle is cut out;
    images that already fit are left alone. A pixel of a smaller image averages those of the larger
    one that it stands for (Pillow's bicubic filter). Images are grey if the first 100 training
    images are, else RGB. Training images are shifted by up to an eighth of their size, what moves
    in is black, and half of them are mirrored. All are standardised with the mean and the standard
    deviation of the training pixels per channel.

    Only the images in use are decoded, once, into memory. The files are read where they lie:
    nothing is copied to a cache, and the network is not used. Links are followed wherever
    they lead, because Hugging Face's own cache is made of them, but no file is read twice.

    Args:
        seed_of_split: Fixes which images validate and which are kept, at least 0.
        data_dir: The folder.
        train_size: Number of training images to keep after the validation split; None for all.
        image_size: Height and width in pixels, from 4 to 64; None for the median shorter side of
            the first 100 training images, but at most 64.
        test_size: Number of test images to keep, the same share of each class; None for all.

    Raises:
        ValueError: If the folder, a file, a column or an image is missing or cannot be read, if
            there are fewer than 2 classes or too few images of one, or if `train_size`,
            `image_size` or `test_size` is out of its range.

    References:
        He, Zhang, Ren and Sun, 2015, "Deep Residual Learning for Image Recognition", section 4.2,
        for the
        augmentation: theirs pads after subtracting the mean, this before, so that what moves in is
            black.
    """
    if image_size is not None and not SMALLEST_SIDE <= image_size <= LARGEST_SIDE:
        raise ValueError(
            f"image_size must be from {SMALLEST_SIDE} to {LARGEST_SIDE} for workload 'parquet', "
            f"got {image_size!r}; larger images are read by --workload imagefolder"
        )
    data = _data_folder(data_dir)
    train_split = _Split.find(data, "train")
    test_split = _Split.find(data, "test")
    classes, labels = _numbered(train_split.labels())
    validation, train = validation_and_training(labels, train_size, seed=seed_of_split)
    test_labels = _looked_up(test_split.labels(), classes)
    test = keep_stratified(test_labels, test_size, seed=seed_of_split, what="test_size")

    looked_at = np.arange(min(IMAGES_LOOKED_AT, len(labels)))
    encoded = train_split.encoded(np.unique(np.concatenate([looked_at, train, validation])))
    form = common_format([encoded[row] for row in looked_at.tolist()])
    if image_size is not None:
        form = replace(form, side=image_size)

    def batch_of(rows: Indices) -> Batch:
        images = decode_images([encoded[row] for row in rows.tolist()], form)
        return images, torch.from_numpy(labels[rows])

    test_images = decode_images(list(test_split.encoded(test).values()), form)
    train_set, validation_set, test_set = standardized(
        batch_of(train),
        batch_of(validation),
        (test_images, torch.from_numpy(test_labels[test])),
        augment=Augmentation(shift=form.side // 8, flip=True),
    )
    return ImageWorkload(
        name="parquet",
        measure=Measure(),
        train=train_set,
        validation=validation_set,
        test=test_set,
        classes=len(classes),
        defaults=PARQUET_DEFAULTS,
    )


@dataclass(frozen=True)
class _Split:
    """The parquet files of one split, in order.

    Attributes:
        name: Of the split.
        files: Where they are. Rows are counted from 0 over all of them.
    """

    name: str
    files: tuple[str, ...]

    @classmethod
    def find(cls, data: DataFolder, name: str) -> _Split:
        """Find the files of a split, whole or in shards, in the folder or its subfolder `data`."""
        for folder in (data.root, data.root / "data"):
            if not folder.is_dir():
                continue
            for pattern in (f"{name}.parquet", f"{name}-*.parquet"):
                found = data.files_in(folder, partial(fnmatch, pat=pattern))
                if found:
                    return cls(name, tuple(map(str, found)))
        raise ValueError(
            f"data_dir must be {PARQUET_LAYOUT}, got '{data.root}' without {name} files"
        )

    def labels(self) -> npt.NDArray[Any]:
        """Return the column `label`, shape [N], at least one row."""
        with self._column("label") as (_, tables):
            columns = [table["label"] for table in tables]
        if not sum(map(len, columns)):
            raise ValueError(f"the {self.name} split must hold images, got none")
        if any(column.null_count for column in columns):
            raise ValueError(
                f"label must be given for every image, got none for some of the {self.name} split"
            )
        labels = np.concatenate([column.to_numpy() for column in columns])
        if labels.dtype.kind not in "iub" and not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"label must be an integer or a string, got {labels.tolist()[0]!r} "
                f"in the {self.name} split"
            )
        return labels

    def encoded(self, rows: Indices | None = None) -> dict[int, EncodedImage]:
        """Return image files by their rows.

        Args:
            rows: Which of them, sorted without repetition; None for all.
        """
        found: dict[int, EncodedImage] = {}
        with self._column("image") as (feature, tables):
            is_struct = isinstance(feature, dict) and "bytes" in feature
            if not is_struct and not isinstance(feature, datasets.Image):
                raise ValueError(f"image must be a struct with bytes, got {feature}")
            start = 0
            for table in tables:
                end = start + len(table)
                inside = np.arange(start, end)
                if rows is not None:
                    inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
                images = table["image"].take(inside - start).to_pylist()
                for row, image in zip(inside.tolist(), images, strict=True):
                    found[row] = EncodedImage(
                        where=f"row {row} of the {self.name} split",
                        content=image["bytes"] if image else None,
                    )
                start = end
        return found

    @contextlib.contextmanager
    def _column(self, column: str) -> Iterator[tuple[Any, Iterator[Any]]]:
        """Give a column's type and its content as pyarrow tables.

        What `datasets` raises becomes one line, and what it logs is not shown.
        """
        verbosity = datasets.utils.logging.get_verbosity()
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
        try:
            # A streamed dataset stores nothing but a lock file.
            with tempfile.TemporaryDirectory() as folder:
                features = self._open(folder).features
                if column not in features:
                    raise ValueError(f"columns must be image and label, got {', '.join(features)}")
                opened = self._open(folder, columns=[column]).with_format("arrow")
                tables = opened.iter(batch_size=ROWS_AT_ONCE)
                # A reader left open can keep the interpreter from exiting.
                with contextlib.closing(tables):
                    yield features[column], tables
        except Exception as problem:
            # Arrow, Parquet's codecs and datasets each raise their own kinds.
            raise ValueError(f"{self.files[0]}: {in_one_line(problem)}") from problem
        finally:
            datasets.utils.logging.set_verbosity(verbosity)

    def _open(self, folder: str, **options: Any) -> Any:
        return datasets.Dataset.from_parquet(
            list(self.files), cache_dir=folder, streaming=True, **options
        )


def _data_folder(data_dir: Path | None) -> DataFolder:
    """Return the folder, or raise a `ValueError` if there is none."""
    if data_dir is None:
        raise ValueError(f"data_dir must be {PARQUET_LAYOUT}, got None; name the folder")
    if not data_dir.is_dir():
        raise ValueError(
            f"data_dir must be {PARQUET_LAYOUT}, got '{data_dir}'; there is no such folder"
        )
    return DataFolder(data_dir, follows_links=True)


def _numbered(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Indices]:
    """Return the classes of the training images, sorted, and the number of each label's class."""
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            "label must have at least 2 classes in the train split, "
            f"got {classes.tolist()[0]!r} alone"
        )
    return classes, numbers.astype(np.int64)


def _looked_up(labels: npt.NDArray[Any], classes: npt.NDArray[Any]) -> Indices:
    """Return the number of each test label's class among those of the training images."""
    number_of = {label: number for number, label in enumerate(classes.tolist())}
    unknown = [label for label in labels.tolist() if label not in number_of]
    if unknown:
        raise ValueError(
            f"label must be one that the train split has, got {unknown[0]!r} in the test split"
        )
    return np.array([number_of[label] for label in labels.tolist()], dtype=np.int64)
