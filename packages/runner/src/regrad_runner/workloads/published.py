"""Published data sets of small images, read and, on request, downloaded by torchvision."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torchvision import datasets

from regrad_runner.errors import in_one_line
from regrad_runner.workloads.images import Augmentation, ImageWorkload, standardized
from regrad_runner.workloads.samples import Batch
from regrad_runner.workloads.split import validation_and_training
from regrad_runner.workloads.workload import Defaults, Measure

FOLDER = Path("data")
PUBLISHED_DEFAULTS = Defaults(
    epochs=30, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, model="resnet20"
)


@dataclass(frozen=True)
class Published:
    """A workload on a data set that torchvision knows.

    A tenth of the training images, but at most `train_size`, is the validation split, with the same
    share of each class; the published test images are the test split. Training images are shifted
    by up to an eighth of their size, what moves in is black, and half of them are mirrored. All are
    standardised with the mean and the standard deviation of the training pixels per channel.

    Attributes:
        name: Of the workload.
        title: Of the data set.
        kind: torchvision's class for it.
        files: Folder that torchvision reads, inside of the one that it is given.
    """

    name: str
    title: str
    kind: Any
    files: str

    def __call__(
        self,
        *,
        seed_of_split: int = 0,
        data_dir: Path | None = None,
        train_size: int | None = None,
        download: bool = False,
    ) -> ImageWorkload:
        """Return the workload.

        Args:
            seed_of_split: Fixes which images validate and which are kept, at least 0.
            data_dir: Folder that holds the data set's own, or that one itself; None for `data` in
                the working directory.
            train_size: Number of training images to keep after the validation split; None for all.
            download: Whether to fetch what is missing, to that folder.

        Raises:
            ValueError: If the data are not there, are damaged or cannot be fetched, or `train_size`
                is out of its range.
        """
        root = self._root(data_dir or FOLDER)
        if download:
            self._fetch(root)
        pixels, labels = self._read(root, train=True)
        validation, train = validation_and_training(labels.numpy(), train_size, seed=seed_of_split)
        train_set, validation_set, test_set = standardized(
            (pixels[train], labels[train]),
            (pixels[validation], labels[validation]),
            self._read(root, train=False),
            augment=Augmentation(shift=pixels.shape[2] // 8, flip=True),
        )
        return ImageWorkload(
            name=self.name,
            measure=Measure(),
            train=train_set,
            validation=validation_set,
            test=test_set,
            classes=int(labels.max()) + 1,
            defaults=PUBLISHED_DEFAULTS,
        )

    def _root(self, folder: Path) -> Path:
        """Return the folder to give to torchvision: the one around the data set's own."""
        has_own_name = folder.name == Path(self.files).parts[0]
        if has_own_name and not (folder / self.files).is_dir():
            return folder.parent
        return folder

    def _fetch(self, root: Path) -> None:
        """Fetch what is missing; processes that were started together do it one after the other."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            # torchvision's progress output must not mix with our results.
            with FileLock(root / f".{self.name}.lock"), contextlib.redirect_stdout(sys.stderr):
                self.kind(root, download=True)
        except (OSError, RuntimeError) as problem:
            raise ValueError(
                f"download must reach the publisher of {self.title}, got: {in_one_line(problem)}; "
                f"or copy {self.files} into '{root}' by other means"
            ) from problem

    def _read(self, root: Path, *, train: bool) -> Batch:
        """Return images, uint8, shape [N, C, H, W], and labels, int64, shape [N], of one split."""
        try:
            found = self.kind(root, train=train)
        except (RuntimeError, OSError, ValueError, AssertionError) as problem:
            raise ValueError(self._missing(root)) from problem
        pixels = torch.as_tensor(found.data)
        labels = torch.as_tensor(found.targets)
        # Grey images come without a channel dimension, others with it last.
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return pixels.contiguous(), labels.long()

    def _missing(self, root: Path) -> str:
        """Say what is missing in a folder, and what to do."""
        is_there = (root / self.files).is_dir()
        state = "with a damaged or incomplete one" if is_there else "without it"
        got = f"'{root}' {state}"
        if any(chain(root.glob("*.parquet"), (root / "data").glob("*.parquet"))):
            got += "; it holds parquet files, which --workload parquet reads"
        return (
            f"data_dir must be a folder with {self.files} ({self.title}), got {got}; "
            "--download fetches it there, --data-dir names another folder"
        )


cifar10 = Published("cifar10", "CIFAR-10", datasets.CIFAR10, "cifar-10-batches-py")
"""CIFAR-10: 60,000 colour images of 32 × 32 pixels in 10 classes."""

cifar100 = Published("cifar100", "CIFAR-100", datasets.CIFAR100, "cifar-100-python")
"""CIFAR-100: 60,000 colour images of 32 × 32 pixels in 100 classes."""

fashion_mnist = Published(
    "fashion-mnist", "Fashion-MNIST", datasets.FashionMNIST, "FashionMNIST/raw"
)
"""Fashion-MNIST: 70,000 grey images of 28 × 28 pixels, clothes in 10 classes."""
