"""Settings of a comparison or a run: from a YAML file and flags, checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

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
from regrad_runner.settings.flag import (
    HOW_IT_IS_TRAINED,
    WHAT_IS_TRAINED,
    WHERE_IT_GOES,
    Flag,
)

FIRST_TUNING_SEED = 1_000_000
MOST_EXTENSIONS = 10  # of the rates given, by an arm
AUTO = "auto"
LAST_SEED = 2**32 - 1  # the largest that NumPy takes
MOST_THREADS = 1024  # with more, the process dies silently
# Python refuses to print a number of more than 4,300 digits, but reads one in hexadecimal.
LARGEST_INTEGER = 2**53


# Settings of several kinds of command, each of which has its own default.
ArmsOfCorrections = Annotated[
    tuple[str, ...],
    Flag(
        "For example xgrad:horizon=2 agc; a+b combines two; all: every one.",
        WHAT_IS_TRAINED,
        "NAME...",
    ),
]
Seeds = Annotated[
    int,
    Field(gt=0, le=FIRST_TUNING_SEED),
    Flag("Paired runs of each arm; 10 by default, 6 for a script.", WHAT_IS_TRAINED, "N"),
]
Threads = Annotated[
    Annotated[int, Field(gt=0, le=MOST_THREADS)] | None,
    Flag("CPU threads of each process.", HOW_IT_IS_TRAINED, "N"),
]


class Settings(BaseModel):
    """The settings of every command that writes a folder."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    tracker: Annotated[
        Literal["mlflow", "tensorboard", "wandb", "none"],
        Flag("mlflow (the default), tensorboard, wandb or none.", WHERE_IT_GOES, "KIND"),
    ] = "mlflow"
    tracking_uri: Annotated[
        str | None,
        Flag("MLflow server; by default a database in the folder.", WHERE_IT_GOES, "URI"),
    ] = None

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object, info: ValidationInfo) -> object:
        """Check each value before it is converted.

        Refused are texts that would break a terminal, a table or a settings file, and yes or no
        where a number belongs.
        """
        name = str(info.field_name)
        takes_yes = cls.model_fields[name].annotation is bool
        items = value if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, str):
                check_text(name, item)
            if isinstance(item, bool) and not takes_yes:
                raise ValueError(f"{name} must not be yes or no, got {item!r}")
            if isinstance(item, int) and abs(item) > LARGEST_INTEGER:
                raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {shown(item)}")
        return value

    @field_validator("tracking_uri")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value if value is None else check_address(value)


class RunConfig(Settings):
    """What `compare` on a workload and `train` share.

    None stands for the workload's default, until `resolved` fills it in.
    """

    workload: Annotated[
        str, Flag("Data to train on; digits by default.", WHAT_IS_TRAINED, "NAME")
    ] = "digits"
    data_dir: Annotated[
        str | None,
        Flag("Folder or file with the data, if it needs one.", WHAT_IS_TRAINED, "PATH"),
    ] = None
    download: Annotated[bool, Flag("Download published data that is missing.", WHAT_IS_TRAINED)] = (
        False
    )
    image_size: Annotated[
        int | None,
        Flag("Resize images to N by N pixels, if sizes differ.", WHAT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    train_size: Annotated[
        int | None,
        Flag("Training samples to keep; all by default.", WHAT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    model: Annotated[
        str | None,
        Flag("resnet8, gpt, or a classifier of torchvision.", WHAT_IS_TRAINED, "NAME"),
    ] = None
    width: Annotated[
        int | None,
        Flag("Channels of the first stage, or of every layer of a gpt.", WHAT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    norm: Annotated[
        Literal["batch", "group", "none"] | None,
        Flag("Normalization: batch (the default), group or none.", WHAT_IS_TRAINED, "NORM"),
    ] = None
    epochs: Annotated[
        int | None, Flag("Passes over the training samples.", HOW_IT_IS_TRAINED, "N")
    ] = Field(default=None, gt=0)
    batch_size: Annotated[
        int | None,
        Flag("Samples per optimizer step, over all processes.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    optimizer: Annotated[
        str | None, Flag("For example adamw or sgd:nesterov=true.", HOW_IT_IS_TRAINED, "NAME")
    ] = None
    warmup_steps: Annotated[
        int | None, Flag("Steps over which the learning rate rises.", HOW_IT_IS_TRAINED, "N")
    ] = Field(default=None, ge=0)
    accumulate: Annotated[
        int, Flag("Micro-batches per optimizer step; 1 by default.", HOW_IT_IS_TRAINED, "N")
    ] = Field(default=1, gt=0)
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"],
        Flag("no (the default), bf16 or fp16.", HOW_IT_IS_TRAINED, "FORMAT"),
    ] = "no"
    clip_norm: Annotated[
        float | None,
        Flag("Largest gradient norm; no clipping by default.", HOW_IT_IS_TRAINED, "X"),
    ] = Field(default=None, gt=0)
    evaluations_per_epoch: Annotated[
        int | None,
        Flag("How often per epoch to evaluate on validation data.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    threads: Threads = None
    processes: Annotated[
        int | None,
        Flag("Fail unless this many processes were launched.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    workers: Annotated[
        int, Flag("Data-loading processes; 0 by default.", HOW_IT_IS_TRAINED, "N")
    ] = Field(default=0, ge=0, le=MOST_THREADS)

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate ({self.accumulate}), "
                f"got {self.batch_size}"
            )
        return self


class ComparisonSettings(Settings):
    """Settings of a comparison: each of its `corrections` is an arm, run on the same seeds."""

    corrections: ArmsOfCorrections = ("powergrad", "xgrad", "xgrad+powergrad")
    controls: Annotated[bool, Flag("Leave out the controls to beat.", WHAT_IS_TRAINED)] = True
    seeds: Seeds = 10
    lr: Annotated[
        tuple[float, ...] | Literal["auto"] | None,
        Flag(
            "Learning rate; with several, or auto, each arm chooses its best.",
            HOW_IT_IS_TRAINED,
            "X,X",
        ),
    ] = None
    tuning_seeds: Annotated[
        int, Flag("Runs per rate in that choice; 3 by default.", HOW_IT_IS_TRAINED, "N")
    ] = Field(default=3, gt=0, le=FIRST_TUNING_SEED)
    tuning_extensions: Annotated[
        int,
        Flag(
            "Rates an arm may add if its best is at an edge; 3 by default.",
            HOW_IT_IS_TRAINED,
            "N",
        ),
    ] = Field(default=3, ge=0, le=MOST_EXTENSIONS)

    @field_validator("lr", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if value in (AUTO, [AUTO], (AUTO,)):
            return AUTO
        return (value,) if isinstance(value, int | float | str) else value

    @field_validator("lr")
    @classmethod
    def _positive_and_different(
        cls, value: tuple[float, ...] | Literal["auto"] | None
    ) -> tuple[float, ...] | Literal["auto"] | None:
        if isinstance(value, tuple):
            _check_learning_rates(value)
        return value

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from; none if they are still left to the workload."""
        return self.lr if isinstance(self.lr, tuple) else ()


class CompareConfig(ComparisonSettings, RunConfig):
    """Settings of a comparison on a workload."""

    probe_every: Annotated[
        int | None,
        Flag("Steps between probes of gradient quality; none by default.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=None, gt=0)
    probe_size: Annotated[
        int,
        Flag("Samples in a probe's large batch; 2048 by default.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=2048, gt=0)


class TrainConfig(RunConfig):
    """Settings of one run: its `corrections` are attached together, in their order."""

    corrections: Annotated[
        tuple[str, ...],
        Flag("For example xgrad:horizon=2 agc; all: every one.", WHAT_IS_TRAINED, "NAME..."),
    ] = ()
    lr: Annotated[float | None, Flag("Initial learning rate.", HOW_IT_IS_TRAINED, "X")] = Field(
        default=None, gt=0
    )
    seed: Annotated[
        int,
        Flag("Fixes weights, data order and augmentation; 0 by default.", HOW_IT_IS_TRAINED, "N"),
    ] = Field(default=0, ge=0, le=LAST_SEED)
    checkpoint_every: Annotated[
        int | None,
        Flag("Steps between checkpoints; an epoch by default.", WHERE_IT_GOES, "N"),
    ] = Field(default=None, gt=0)
    keep_checkpoints: Annotated[
        int, Flag("Checkpoints to keep; 2 by default.", WHERE_IT_GOES, "N")
    ] = Field(default=2, gt=0)


Config = TypeVar("Config", bound=Settings)
Trained = TypeVar("Trained", bound=RunConfig)


def rounded_rate(rate: float) -> float:
    """Return a learning rate as a person would write it: with three digits.

    Example:
        >>> rounded_rate(0.1 / 3)
        0.0333
    """
    return float(f"{rate:.3g}")


def _check_learning_rates(values: tuple[float, ...]) -> None:
    """Raise a `ValueError` unless these are positive numbers, none of them twice."""
    is_positive = bool(values) and min(values) > 0
    is_different = len(set(values)) == len(values)
    if not (is_positive and is_different):
        said = ", ".join(f"{value:g}" for value in values) or "none"
        raise ValueError(f"lr must be different positive numbers, got {said}")
