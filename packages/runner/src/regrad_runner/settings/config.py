"""Settings of a comparison or a run: from a YAML file and flags, checked before anything starts."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from regrad_runner.addresses import check_address
from regrad_runner.settings.checking import check_text, shown

FIRST_TUNING_SEED = 1_000_000
LAST_SEED = 2**32 - 1  # that NumPy takes
MOST_THREADS = 1024  # more end the process without a word
LARGEST_NUMBER = (
    2**53
)  # Python writes no number of more than 4,300 digits, but reads one in hexadecimal


class RunConfig(BaseModel):
    """What `compare` and `train` share. None stands for what suits the workload until `resolved` fills it in.

    Attributes:
        workload: Name of the workload, with options such as "text:context=256".
        data_dir: Folder or file with its data, for workloads that need one.
        download: Whether missing data may be fetched.
        image_size: Height and width to give the images, for workloads whose images have many sizes.
        train_size: Training samples to keep; of images the same share of each class.
        model: Name of the model, with options such as "gpt:layers=2".
        width: Channels of its first stage, or of every layer, where it can be chosen.
        norm: Normalisation; "group" does not mix the samples of a batch, "none" is none at all.
        epochs: Passes over the training samples.
        batch_size: Samples per optimizer step, over all processes and micro-batches.
        optimizer: Name with options, such as "sgd:momentum=0.9".
        warmup_steps: Optimizer steps in which the learning rate rises linearly.
        accumulate: Micro-batches per optimizer step.
        mixed_precision: Number format of the forward pass.
        clip_norm: Largest gradient norm, or None for no clipping.
        evaluations_per_epoch: How often the validation samples are looked at.
        threads: CPU threads of each process.
        workers: Processes beside each that make samples for it.
        processes: Processes that must have been started, or None for any number.
        tracker: Where metrics go.
        tracking_uri: An MLflow server or database, or None for a database in the output folder.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    workload: str = "digits"
    data_dir: str | None = None
    download: bool = False
    image_size: int | None = Field(default=None, gt=0)
    train_size: int | None = Field(default=None, gt=0)
    model: str | None = None
    width: int | None = Field(default=None, gt=0)
    norm: Literal["batch", "group", "none"] | None = None
    epochs: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    optimizer: str | None = None
    warmup_steps: int | None = Field(default=None, ge=0)
    accumulate: int = Field(default=1, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    clip_norm: float | None = Field(default=None, gt=0)
    evaluations_per_epoch: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0, le=MOST_THREADS)
    processes: int | None = Field(default=None, gt=0)
    workers: int = Field(default=0, ge=0, le=MOST_THREADS)
    tracker: Literal["mlflow", "none"] = "mlflow"
    tracking_uri: str | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what would tear a terminal, a table or a file of settings, and yes or no where a number belongs."""
        name = str(info.field_name)
        takes_yes = cls.model_fields[name].annotation is bool
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str):
                check_text(name, item)
            if isinstance(item, bool) and not takes_yes:
                raise ValueError(f"{name} must not be yes or no, got {item!r}")
            if isinstance(item, int) and abs(item) > LARGEST_NUMBER:
                raise ValueError(f"{name} must be at most {LARGEST_NUMBER}, got {shown(item)}")
        return value

    @field_validator("tracking_uri")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value if value is None else check_address(value)

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate ({self.accumulate}), got {self.batch_size}"
            )
        return self


class CompareConfig(RunConfig):
    """Settings of a comparison.

    Attributes:
        corrections: One string per arm; "+" stacks corrections.
        controls: Whether the trivial changes that corrections must beat run too.
        seeds: Number of paired seeds, counted from 0.
        lr: One learning rate for every arm, or several among which every arm chooses on the validation split.
        tuning_seeds: Seeds per learning rate and arm in that choice; none of them is compared on.
        probe_every: Optimizer steps between probes of gradient quality, or None for none.
        probe_size: Training samples of the large batch that gradients are compared with there.
    """

    corrections: tuple[str, ...] = ("powergrad", "xgrad", "xgrad+powergrad")
    controls: bool = True
    seeds: int = Field(default=10, gt=0, le=FIRST_TUNING_SEED)
    lr: tuple[float, ...] | None = None
    tuning_seeds: int = Field(default=2, gt=0, le=FIRST_TUNING_SEED)
    probe_every: int | None = Field(default=None, gt=0)
    probe_size: int = Field(default=2048, gt=0)

    @field_validator("lr", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float | str) else value

    @field_validator("lr")
    @classmethod
    def _positive_and_different(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return value if value is None else _learning_rates(value)


class TrainConfig(RunConfig):
    """Settings of one run.

    Attributes:
        corrections: Attached together, in this order.
        lr: Learning rate at the start of the cosine.
        seed: Fixes initial weights, order of the data and augmentation.
        checkpoint_every: Optimizer steps between checkpoints, or None for one at the end of each epoch.
        keep_checkpoints: How many of the last ones stay.
    """

    corrections: tuple[str, ...] = ()
    lr: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, le=LAST_SEED)
    checkpoint_every: int | None = Field(default=None, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)


Config = TypeVar("Config", bound=RunConfig)


def _learning_rates(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or min(values) <= 0 or len(set(values)) < len(values):
        raise ValueError(
            f"lr must be different positive numbers, got {', '.join(f'{v:g}' for v in values) or 'none'}"
        )
    return values
