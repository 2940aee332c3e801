"""Handwritten digits that ship with scikit-learn: real data, nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from regrad_runner.workloads.images import Augmentation, ImageWorkload, standardized
from regrad_runner.workloads.split import keep_stratified, take_stratified
from regrad_runner.workloads.workload import Defaults, Measure

TEST_SIZE = 360
VALIDATION_SIZE = 360
DIGITS_DEFAULTS = Defaults(
    epochs=20, batch_size=64, lr=0.05, momentum=0.9, model="resnet8", evaluations_per_epoch=4
)


def load(
    *, seed_of_split: int = 0, data_dir: Path | None = None, train_size: int | None = None
) -> ImageWorkload:
    """Return the digits: 1,077 to train, 360 to validate, 360 to test.

    These are 1,797 images of 8×8 pixels in 17 levels of grey. Every split holds each digit in the
    same proportion. Training images are shifted by up to one pixel, what moves in is black; never
    mirrored, a mirrored digit is another one. All are standardised with the mean and the standard
    deviation of the training pixels.

    Args:
        seed_of_split: Fixes the three splits, at least 0.
        data_dir: Must be None: the digits need no folder.
        train_size: Number of training images to keep, 10 to 1,067 or 1,077; None for all 1,077.

    Raises:
        ValueError: If a folder is given, or `train_size` is out of its range.

    References:
        Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository: its test set, which is what scikit-learn holds.
    """
    if data_dir is not None:
        raise ValueError(f"data_dir must be left out for workload 'digits', got {str(data_dir)!r}")
    pixels, labels = load_digits(return_X_y=True)
    test, rest = take_stratified(labels, TEST_SIZE, seed=seed_of_split, what="test size")
    of_rest, others = take_stratified(
        labels[rest], VALIDATION_SIZE, seed=seed_of_split, what="validation size"
    )
    validation = rest[of_rest]
    train = rest[others]
    train = train[keep_stratified(labels[train], train_size, seed=seed_of_split)]
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    splits = [(images[chosen], targets[chosen]) for chosen in (train, validation, test)]
    train_set, validation_set, test_set = standardized(*splits, augment=Augmentation(shift=1))
    return ImageWorkload(
        name="digits",
        measure=Measure(),
        train=train_set,
        validation=validation_set,
        test=test_set,
        classes=10,
        defaults=DIGITS_DEFAULTS,
    )
