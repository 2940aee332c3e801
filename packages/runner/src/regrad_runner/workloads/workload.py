"""What a workload is: data, model, loss, measure and the settings that suit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from torch import Tensor, nn

from regrad_runner.workloads.samples import Samples

MOST_DECIMALS = 12
BASELINE_TARGET: Final = "baseline"
Target = float | Literal["baseline"] | None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The one number by which runs are compared.

    Attributes:
        name: As printed; on the validation split "test " in front of it becomes "validation ".
        higher_is_better: The direction of better.
        target: The value on the validation samples to which a run's steps are counted: "baseline"
            for the median end of the baseline's runs, a number, or None to count none.
        decimals: Digits after the point where it is printed, 0 to 12.
        on_validation: What it is called on the validation split; None for "validation " in front.
    """

    name: str = "test accuracy"
    higher_is_better: bool = True
    target: Target = BASELINE_TARGET
    decimals: int = 4
    on_validation: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every field is of its type and in its range: it may come from a file."""
        is_target = isinstance(self.target, float | int | None) or self.target == BASELINE_TARGET
        is_count = type(self.decimals) is int and 0 <= self.decimals <= MOST_DECIMALS
        names = isinstance(self.name, str) and isinstance(self.on_validation, str | None)
        return is_target and is_count and names

    @property
    def fixed_target(self) -> float | None:
        """The target if it is a number; None if the runs of a comparison have to say it."""
        return None if isinstance(self.target, str) else self.target

    @property
    def counts_samples(self) -> bool:
        """Whether it is the share of samples that are right, as every accuracy is."""
        return self.name.endswith("accuracy")

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
        reason: Why these and no others, said before the first run where `model` is trained; empty
            where there is nothing to say.
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
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data with model, loss and measure, and the settings to train on them.

    A subclass implements the methods that raise here.

    Attributes:
        name: As the user typed it, without options.
        measure: What runs are compared by.
        train: Training samples.
        validation: Samples for tuning and for curves.
        test: Samples that each run looks at once.
        defaults: Settings to start from.
        reads_probabilities: Whether `score` reads more of logits than their order. Where a
            corrected criterion says which probabilities it fits (its method `probabilities`), as
            PowerGrad's does, it is given their logarithms instead: what a user who reads them would
            read.
        parts: Equal parts of a run, each with the whole schedule of the learning rate, warm-up
            included; at least 1. `begin_step` may make them differ.
    """

    reads_probabilities: ClassVar[bool] = False

    name: str
    measure: Measure
    train: Samples
    validation: Samples
    test: Samples
    defaults: Defaults
    parts: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each split has."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
        }

    def build_model(self, name: str, *, seed: int = 0) -> nn.Module:
        """Return a model in training mode, on the CPU, in float32; equal ones for equal seeds.

        It draws no global random number. A subclass may take more keyword arguments, with defaults:
        those called `width` and `norm` are the settings of that name, all others are options of the
        model's name, such as "gpt:layers=2". What an argument is annotated with is checked before
        the call.

        Args:
            name: Of the model, without options.
            seed: Fixes the initial weights.

        Raises:
            ValueError: If there is no model of this name, or an argument does not fit.
        """
        raise TypeError(f"{type(self).__name__} must implement build_model")

    def model_settings(self, name: str) -> Mapping[str, Any]:
        """Return `width` and `norm` that suit a model, if it takes them."""
        return {}

    def binary_parameters(self, model: nn.Module) -> list[Tensor]:
        """Return the weights that the model uses by their signs alone; none unless told otherwise.

        They are parameter groups with `binary=True`, an optimizer that holds signs is given signs,
        and how often they change is measured.

        Args:
            model: What `build_model` returned.
        """
        return []

    def begin_step(self, model: nn.Module, part: int) -> None:
        """Prepare a model for a training step; nothing unless told otherwise.

        Called before every micro-batch, and where a run is continued.

        Args:
            model: What `build_model` returned.
            part: Of the run, from 0, out of `parts`.
        """

    def criterion(self) -> nn.Module:
        """Return the loss of what the model returned and the targets, a mean over samples."""
        return nn.CrossEntropyLoss()

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the measure is made of: a sum and a number for each sample.

        The measure of a split is the sum of the first over all its samples by the sum of the
        second. So a sample may hold several things that count, such as the bytes of a window, or
        part of one.

        Args:
            outputs: What the model returned in evaluation mode.
            targets: Of the same samples, on the same device.

        Returns:
            Two tensors of shape [B].
        """
        raise TypeError(f"{type(self).__name__} must implement score")


def name_on_validation(measure: Measure) -> str:
    """Return what the measure is called on the validation samples.

    Example:
        >>> name_on_validation(Measure(name="test accuracy", target=None))
        'validation accuracy'
    """
    if measure.on_validation is not None:
        return measure.on_validation
    return f"validation {measure.name.removeprefix('test ')}"
