"""Settings of a comparison or a run: from a YAML file and flags, checked before anything starts."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from regrad_runner.addresses import check_address
from regrad_runner.reading import read_regular
from regrad_runner.settings.yaml_text import read_yaml, write_yaml
from regrad_runner.training.optimizers import check_rate, spec_of
from regrad_runner.workloads import Workload, settings_of_model

FIRST_TUNING_SEED = 1_000_000
LAST_SEED = 2**32 - 1  # that NumPy takes
MOST_THREADS = 1024  # more end the process without a word
LONGEST_TEXT = 1000
LARGEST_NUMBER = (
    2**53
)  # Python writes no number of more than 4,300 digits, but reads one in hexadecimal
WITHOUT_EFFECT_ON_RESULTS = frozenset(
    {
        "download",
        "workers",
        "tracker",
        "tracking_uri",
        "threads",
        "processes",
        "checkpoint_every",
        "keep_checkpoints",
    }
)
# Below this many pixels per batch, one thread is as fast as two that wait for each other.
PIXELS_FOR_ONE_THREAD = 32_768


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
                _check_text(name, item)
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

    def resolved(self, workload: Workload) -> Self:
        """Return a copy in which nothing is left to the workload's defaults.

        Raises:
            ValueError: If a value does not fit the workload.
        """
        defaults = workload.defaults
        names = ("epochs", "batch_size", "model", "evaluations_per_epoch")
        values = {name: getattr(self, name) or getattr(defaults, name) for name in names}
        if self.batch_size is None:  # a folder of a few images is a workload too
            values["batch_size"] = min(values["batch_size"], len(workload.train))
        values |= settings_of_model(
            workload, values["model"], {"width": self.width, "norm": self.norm}
        )
        values["threads"] = self.threads or _threads(values["batch_size"] * workload.train.work)
        steps = values["epochs"] * (len(workload.train) // values["batch_size"])
        usual = min(defaults.warmup_steps, steps // 10)
        values["warmup_steps"] = usual if self.warmup_steps is None else self.warmup_steps
        values["optimizer"], lr = spec_of(self.optimizer, defaults)
        given = self.model_dump()
        values["lr"] = lr if given["lr"] is None else given["lr"]
        for rate in values["lr"] if isinstance(values["lr"], tuple) else (values["lr"],):
            check_rate(values["optimizer"], rate)
        if values["batch_size"] > len(workload.train):
            raise ValueError(
                f"batch_size must be at most {len(workload.train)} (the training {workload.train.kind}), "
                f"got {values['batch_size']}"
            )
        return validated(type(self), {**given, **values})


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
# What PyYAML's own readers of numbers, dates and deep nesting raise beside its YAMLError.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# The first and the last line of settings that regrad wrote: without its last line a file was cut.
WRITTEN, LAST_LINE = "# Written by regrad. The last line is three dots.", "..."
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 3


def load_config(
    kind: type[Config], *, file: Path | None = None, flags: Mapping[str, Any]
) -> Config:
    """Return the settings in `file`, with the flags that were given in their place.

    Args:
        kind: `CompareConfig` or `TrainConfig`.
        file: A YAML mapping from settings to values, or None.
        flags: Values by setting; None stands for a flag that was not given.

    Raises:
        ValueError: If the file cannot be read, or a setting is unknown or out of its range.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    return validated(kind, {**(read_settings(file) if file else {}), **given})


def validated(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Return the settings, or raise a `ValueError` of one line that names setting, rule and value."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as problems:
        raise ValueError(_line(kind, problems)) from None


def shown(value: object) -> str:
    """Return what an error shows of a value, in one short line: YAML of a few bytes can stand for gigabytes."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a very long {type(value).__name__}"


def write_config(config: RunConfig) -> str:
    """Return the settings as YAML that `load_config` reads back, or refuses where a part of it is missing."""
    return f"{WRITTEN}\n{write_yaml(config.model_dump(mode='json'))}{LAST_LINE}\n"


def first_difference(old: RunConfig, new: RunConfig) -> str | None:
    """Name the first setting in which two configurations would give different results, with both values."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name, value in after.items():
        if name not in WITHOUT_EFFECT_ON_RESULTS and before.get(name) != value:
            return f"{name} {before.get(name)!r} there and {value!r} here"
    return None


def continued(old: Config, new: Config) -> Config:
    """Return settings that continue a folder: as `old`, with more corrections or seeds if `new` has them.

    Args:
        old: The folder's settings.
        new: What is asked for now.

    Returns:
        `new`, its corrections in the order of `old` and those that it adds after them, so that arms and controls
        that were there keep their names.

    Raises:
        ValueError: If `new` leaves out a correction or a seed, or differs in anything else that has an effect.
    """
    more: dict[str, Any] = {}
    if isinstance(old, CompareConfig) and isinstance(new, CompareConfig):
        added = tuple(text for text in new.corrections if text not in old.corrections)
        if set(old.corrections) <= set(new.corrections):
            more["corrections"] = (*old.corrections, *added)
        if new.seeds > old.seeds:
            more["seeds"] = new.seeds
    difference = first_difference(
        old, new.model_copy(update={name: getattr(old, name) for name in more})
    )
    if difference:
        raise ValueError(
            f"out must hold the same configuration, got {difference}; choose another folder"
        )
    return new.model_copy(update=more)


def _check_text(name: str, text: str) -> None:
    """Raise a `ValueError` where a text is empty, too long, or would tear a terminal."""
    if not (text.isprintable() and len(text) <= LONGEST_TEXT):
        raise ValueError(
            f"{name} must be at most {LONGEST_TEXT} printable characters, got {shown(text)}"
        )
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r}; leave it out for the default")


def _threads(pixels: int) -> int:
    return 1 if pixels < PIXELS_FOR_ONE_THREAD else torch.get_num_threads()


def read_settings(file: Path) -> dict[str, Any]:
    """Return what a YAML file says, whatever settings it names.

    Raises:
        ValueError: If it cannot be read or is no mapping.
    """
    try:
        text = read_regular(file).decode("utf-8")
        _check_is_whole(text)
        loaded = read_yaml(text)
    except OSError as problem:
        raise ValueError(
            f"config must be a readable file, got '{file}': {problem.strerror or 'something else'}"
        ) from None
    except (yaml.YAMLError, *UNREADABLE) as problem:
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(f"config must be YAML, got '{file}': {why}") from None
    if not isinstance(loaded, dict):
        raise ValueError(  # noqa: TRY004 - what the file says is wrong, not what a caller passed
            f"config must map settings to values, got {type(loaded).__name__} in '{file}'"
        )
    for name in loaded:
        if not isinstance(name, str):
            raise ValueError(f"no setting named {shown(name)} in '{file}'")  # noqa: TRY004 - as above
    return loaded


def _check_is_whole(text: str) -> None:
    """Raise a `ValueError` for a part of what `write_config` wrote: fewer settings would read as others."""
    first, last = text.partition("\n")[0].strip(), text.rstrip().rpartition("\n")[2]
    if first == WRITTEN and last != LAST_LINE:
        raise ValueError(f"its last line is not {LAST_LINE!r}: a part of it is missing")


def _learning_rates(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or min(values) <= 0 or len(set(values)) < len(values):
        raise ValueError(
            f"lr must be different positive numbers, got {', '.join(f'{v:g}' for v in values) or 'none'}"
        )
    return values


def _line(kind: type[RunConfig], problems: ValidationError) -> str:
    """Say the first problem in one line."""
    problem = problems.errors()[0]
    name, message, value = str(next(iter(problem["loc"]), "")), problem["msg"], problem["input"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(kind.model_fields)}"
        return f"no setting named {shown(name)}; {hint}"
    if problem["type"] == "value_error":
        return message.removeprefix("Value error, ")
    rule = re.split(r", (?:unable|got) ", message.replace("Input should", "must"))[0]
    return f"{name} {rule}, got {shown(value)}"
