"""What is trained: data, model, loss, measure and settings, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import regrad
from regrad import PluginLoadError
from torch import Tensor, nn

from regrad_runner.settings.specs import check_options, parameters_of, read_spec
from regrad_runner.workloads.samples import Samples

GROUP = "regrad.workloads"
# What a workload's function and its models are given by settings of their own: no options.
OF_DATA = ("seed_of_split", "data_dir", "train_size", "download", "image_size")
OF_MODELS = ("name", "seed", "width", "norm")
MOST_DECIMALS = 12


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The one number by which runs are compared.

    Attributes:
        name: As printed; on the validation split "test " in front of it becomes "validation ".
        higher_is_better: The direction of better.
        target: The value whose first reaching is timed, or None for no such timing.
        decimals: Digits after the point where it is printed, 0 to 12.
    """

    name: str = "test accuracy"
    higher_is_better: bool = True
    target: float | None = None
    decimals: int = 4

    @property
    def is_whole(self) -> bool:
        """Whether every field is of its type and in its range: it may come from a file."""
        numbers = isinstance(self.target, float | int | None) and type(self.decimals) is int
        return numbers and isinstance(self.name, str) and 0 <= self.decimals <= MOST_DECIMALS

    @property
    def direction(self) -> str:
        """What is better, in words."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    def written(self, value: float) -> str:
        """Return a value of it as it is printed."""
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings that suit a workload; every one can be overridden.

    Attributes:
        epochs: Passes over the training samples.
        batch_size: Samples per optimizer step, over all processes.
        optimizer: Name of the optimizer.
        lr: Learning rate after the warm-up; it falls to zero along a cosine.
        momentum: Of SGD.
        weight_decay: Factor of the weights that is added to the gradient; of AdamW's own decay.
        model: Name for `Workload.build_model`.
        warmup_steps: Steps in which the learning rate rises, but at most a tenth of a run.
        evaluations_per_epoch: How often the validation samples are looked at.
    """

    epochs: int
    batch_size: int
    optimizer: str = "sgd"
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    model: str
    warmup_steps: int = 0
    evaluations_per_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data with model, loss and measure, and the settings to train on them. A subclass implements what raises here.

    Attributes:
        name: As the user typed it, without options.
        measure: What runs are compared by.
        train: Training samples.
        validation: Samples for tuning and for curves.
        test: Samples that each run looks at once.
        defaults: Settings to start from.
        reads_probabilities: Whether `score` reads more of logits than their order. Where a corrected criterion says
            which probabilities it fits (its method `probabilities`), as PowerGrad's does, it is given their
            logarithms instead: what a user who reads them would read.
    """

    reads_probabilities: ClassVar[bool] = False

    name: str
    measure: Measure
    train: Samples
    validation: Samples
    test: Samples
    defaults: Defaults

    def build_model(self, name: str, *, seed: int = 0) -> nn.Module:
        """Return a model in training mode, on the CPU, in float32; equal ones for equal seeds.

        It draws no global random number. A subclass may take more keyword arguments, with defaults: those called
        `width` and `norm` are the settings of that name, all others are options of the model's name, such as
        "gpt:layers=2". What an argument is annotated with is checked before the call.

        Args:
            name: Of the model, without options.
            seed: Fixes the initial weights.

        Raises:
            ValueError: If there is no model of this name, or an argument does not fit.
        """
        raise TypeError(f"{type(self).__name__} must implement build_model")

    def model_settings(self, name: str) -> Mapping[str, Any]:
        """Return the settings `width` and `norm` that a model has unless told otherwise, where it takes them."""
        return {}

    def criterion(self) -> nn.Module:
        """Return the loss: called with what the model returned and the targets, it returns a mean over samples."""
        return nn.CrossEntropyLoss()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the measure is made of: a sum and a number for each sample.

        The measure of a split is the sum of the first over all its samples by the sum of the second. So a sample
        may hold several things that count, such as the bytes of a window, or part of one.

        Args:
            outputs: What the model returned in evaluation mode.
            targets: Of the same samples, on the same device.

        Returns:
            Two tensors of shape [B].
        """
        raise TypeError(f"{type(self).__name__} must implement score")


def load_workload(
    spec: str,
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    download: bool = False,
    image_size: int | None = None,
) -> Workload:
    """Load a workload by its name among the entry points of group `regrad.workloads`.

    An entry point is a function with these keyword arguments that returns a `Workload`. It may leave out the last
    two, which are then refused, and have others, which are options of the name: "text:context=256".

    Args:
        spec: Name such as "digits" or "cifar10", with options or without.
        seed_of_split: Fixes which samples are for training and which for validation, at least 0.
        data_dir: Folder or file with the data, for workloads that need one.
        train_size: Number of training samples to keep; None for all.
        download: Whether missing data may be fetched from where they are published.
        image_size: Height and width to give the images, in pixels; None for what suits them.

    Returns:
        The workload, its data in memory unless they are large.

    Raises:
        ValueError: If no workload has this name, or its data or options are missing or unfit: one line each.
        PluginLoadError: If its distribution cannot be imported, fails, or returns no workload that can be trained.
    """
    name, options = read_spec(spec, "workload")
    load = regrad.load(name, group=GROUP)
    check_options(load, options, what=f"workload {name!r}", settings=OF_DATA)
    asked: dict[str, Any] = {"download": download, "image_size": image_size}
    asked = {key: value for key, value in asked.items() if value}
    for key in asked.keys() - parameters_of(load).keys():
        raise ValueError(f"{key} must be left out for workload {name!r}, got {asked[key]!r}")
    asked |= {
        "seed_of_split": seed_of_split,
        "data_dir": data_dir,
        "train_size": train_size,
        **options,
    }
    entry = regrad.available(GROUP)[name]
    return _made(load, asked, f"workload {name!r} ({entry.distribution} {entry.version})")


def make_model(
    workload: Workload, spec: str, *, width: int | None, norm: str | None, seed: int
) -> nn.Module:
    """Return a workload's model by its name with options.

    Args:
        workload: Whose `build_model` is called.
        spec: Name with options or without.
        width: The setting; None where the model has none.
        norm: As `width`.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If the model is unknown, or an option or setting does not fit.
    """
    name, options = read_spec(spec, "model")
    check_options(workload.build_model, options, what=f"model {name!r}", settings=OF_MODELS)
    settings = {
        key: value for key, value in {"width": width, "norm": norm}.items() if value is not None
    }
    return workload.build_model(name, seed=seed, **settings, **options)


def settings_of_model(workload: Workload, spec: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `width` and `norm` as they will be: as given, or what suits the model.

    Raises:
        ValueError: If one is given that no model of this workload takes.
    """
    taken, usual = (
        parameters_of(workload.build_model),
        workload.model_settings(read_spec(spec, "model")[0]),
    )
    for key, value in given.items():
        if value is not None and key not in taken:
            raise ValueError(
                f"{key} must be left out for workload {workload.name!r}, got {value!r}"
            )
    return {key: usual.get(key) if value is None else value for key, value in given.items()}


def _made(load: Callable[..., Any], arguments: Mapping[str, Any], whose: str) -> Workload:
    """Return what a workload's function made. What it finds unfit is a `ValueError`; all else is its own fault."""
    try:
        made = load(**arguments)
    except (ValueError, PluginLoadError):
        raise
    except Exception as problem:
        raise PluginLoadError(f"{whose} failed: {type(problem).__name__}: {problem}") from problem
    misfit = _misfit(made)
    if misfit:
        raise PluginLoadError(f"{whose} {misfit}")
    return made  # type: ignore[no-any-return]


def _misfit(made: Any) -> str:
    """Say why something cannot be trained; nothing where it can."""
    if not isinstance(made, Workload):
        return f"must return a Workload, got {type(made).__name__}"
    for method in ("build_model", "score"):
        if getattr(type(made), method) is getattr(Workload, method):
            return f"must return a Workload that implements {method}, got {type(made).__name__}"
    if not isinstance(made.measure, Measure) or not made.measure.is_whole:
        return f"must have a Measure with decimals from 0 to {MOST_DECIMALS}, got {made.measure!r}"
    for split in ("train", "validation", "test"):
        samples = getattr(made, split)
        if not isinstance(samples, Samples) or not len(samples):
            return f"must have Samples in {split}, got {type(samples).__name__}"
    return ""
