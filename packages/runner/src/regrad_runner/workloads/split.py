"""Stratified choices of samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

Indices = npt.NDArray[np.int64]
VALIDATION_SHARE = 0.1


def take_stratified(
    labels: npt.NDArray[np.int64], size: int, *, seed: int, what: str
) -> tuple[Indices, Indices]:
    """Divide samples at random into `size` and the rest, each class in the same proportion.

    Args:
        labels: Class of each sample, shape [N].
        size: Number of samples to take, at least one per class and leaving at least one per class.
        seed: Fixes the choice, at least 0.
        what: What the size is called in an error.

    Returns:
        Sorted positions of the samples taken, shape [size], and of the rest, shape [N - size].

    Raises:
        ValueError: If the size is out of its range or a class has fewer than 2 samples.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            "every class must have at least 2 images to choose from, "
            f"got 1 of class {classes[counts.argmin()]}"
        )
    most = len(labels) - len(classes)
    if not len(classes) <= size <= most:
        raise ValueError(
            f"{what} must be from {len(classes)} (the classes) to {most}, got {size!r}"
        )
    taken, rest = train_test_split(
        np.arange(len(labels)), train_size=size, stratify=labels, random_state=seed
    )
    return np.sort(taken), np.sort(rest)


def validation_and_training(
    labels: npt.NDArray[np.int64], train_size: int | None, *, seed: int
) -> tuple[Indices, Indices]:
    """Divide the training images of a data set into those that validate and those that train.

    A tenth of them validates, but at most `train_size`.

    Args:
        labels: Class of each image, shape [N].
        train_size: Number of images to keep of the others, the same share of each class; None for
            all.
        seed: Fixes the choice, at least 0.

    Returns:
        Sorted positions of the images that validate and of those that train, with each class in
        proportion.

    Raises:
        ValueError: As `take_stratified`.
    """
    size = round(VALIDATION_SHARE * len(labels))
    if train_size is not None:
        size = min(size, train_size)
    classes = len(np.unique(labels))
    size = max(size, classes)
    validation, train = take_stratified(labels, size, seed=seed, what="validation images")
    return validation, train[keep_stratified(labels[train], train_size, seed=seed)]


def keep_stratified(
    labels: npt.NDArray[np.int64], size: int | None, *, seed: int, what: str = "train_size"
) -> Indices:
    """Return the sorted positions of `size` samples, chosen at random; of all if it is None.

    Args:
        labels: Class of each sample, shape [N].
        size: Number of samples to keep, the same share of each class.
        seed: Fixes the choice, at least 0.
        what: What the size is called in an error.

    Raises:
        ValueError: As `take_stratified`.
    """
    if size is None or size == len(labels):
        return np.arange(len(labels))
    return take_stratified(labels, size, seed=seed, what=what)[0]
