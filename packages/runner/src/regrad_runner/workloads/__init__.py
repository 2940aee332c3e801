"""What is trained: data, model, measure and settings, found by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import regrad

from regrad_runner.workloads.images import LabelledImages

GROUP = "regrad.workloads"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The one number by which runs are compared.

    Attributes:
        name: As printed.
        higher_is_better: The direction of better.
        target: The value whose first reaching is timed, or None for no such timing.
    """

    name: str = "test accuracy"
    higher_is_better: bool = True
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings that suit a workload; every one can be overridden.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Samples per optimizer step, over all processes.
        optimizer: Name of the optimizer.
        lr: Learning rate at the start; it falls to zero along a cosine.
        momentum: Of SGD.
        weight_decay: Factor of the weights that is added to the gradient.
        model: Name for `regrad_runner.models.build_model`.
        width: Channels of its first stage.
        evaluations_per_epoch: How often the validation images are looked at.
    """

    epochs: int
    batch_size: int
    optimizer: str = "sgd"
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    model: str
    width: int = 16
    evaluations_per_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data with the settings to train on it.

    Attributes:
        name: As the user typed it.
        measure: What runs are compared by.
        train: Training images, augmented.
        validation: Images for tuning and for curves, not augmented.
        test: Images that each run looks at once, not augmented.
        classes: Number of labels.
        defaults: Settings to start from.
    """

    name: str
    measure: Measure
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: int
    defaults: Defaults


def load_workload(
    name: str,
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    download: bool = False,
    image_size: int | None = None,
) -> Workload:
    """Load a workload by its name among the entry points of group `regrad.workloads`.

    An entry point is a function with these keyword arguments that returns a `Workload`. It may leave out the last
    two, which are then refused.

    Args:
        name: Such as "digits" or "cifar10".
        seed_of_split: Fixes which images are for training and which for validation, at least 0.
        data_dir: Folder with the data, for workloads that need one.
        train_size: Number of training images to keep, the same share of each class; None for all.
        download: Whether missing data may be fetched from where they are published.
        image_size: Height and width to give the images, in pixels; None for what suits them.

    Returns:
        The workload, its images in memory unless they are large.

    Raises:
        ValueError: If no workload has this name, or its data are missing or unfit: one line each.
        PluginLoadError: If its distribution cannot be imported.
    """
    load = regrad.load(name, group=GROUP)
    asked = {key: value for key, value in {"download": download, "image_size": image_size}.items() if value}
    for key in asked.keys() - inspect.signature(load).parameters.keys():
        raise ValueError(f"{key} must be left out for workload {name!r}, got {asked[key]!r}")
    workload = load(seed_of_split=seed_of_split, data_dir=data_dir, train_size=train_size, **asked)
    if not isinstance(workload, Workload):
        raise TypeError(f"workload {name!r} must return a Workload, got {type(workload).__name__}")
    return workload
