"""Settings of a comparison of the user's own script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from regrad_runner.settings.config import (
    AUTO,
    ArmsOfCorrections,
    CompareConfig,
    ComparisonSettings,
    Seeds,
    Threads,
)
from regrad_runner.settings.flag import THE_SCRIPT, Flag
from regrad_runner.settings.measure_source import MeasureSource, read_measure_source

PLACEHOLDER = re.compile(r"\{(seed|lr|out|arm)\}")
NO_RATE = 0.0  # stands for the learning rate of a script that takes none


class ScriptConfig(ComparisonSettings):
    """Settings of a comparison whose runs are runs of one script."""

    script: tuple[str, ...] = Field(min_length=1)
    corrections: ArmsOfCorrections = ("xgrad", "agc", "xgrad+agc")
    seeds: Seeds = 6
    measure: Annotated[
        str,
        Flag("NAME=REGEX, NAME=mlflow:KEY, json:FILE:KEY or csv:FILE:COLUMN.", THE_SCRIPT, "TEXT"),
    ]
    better: Literal["higher", "lower"]
    target: Annotated[
        float | Literal["baseline"],
        Flag("Value to count steps to; the baseline's own median end by default.", THE_SCRIPT, "X"),
    ] = "baseline"
    launcher: Annotated[
        str | None,
        Flag("Starts each run, such as 'torchrun --nproc-per-node 2'.", THE_SCRIPT, "TEXT"),
    ] = None
    timeout: Annotated[
        float | None, Flag("Seconds after which a run is ended; none by default.", THE_SCRIPT, "X")
    ] = Field(default=None, gt=0)
    seed_by_run: Annotated[
        bool, Flag("Let regrad set the seed, if the script takes no {seed}.", THE_SCRIPT)
    ] = False
    optimizer_class: Annotated[
        tuple[str, ...],
        Flag("Correct only optimizers of this class; may be repeated.", THE_SCRIPT, "NAME"),
    ] = ()
    threads: Threads = None

    @field_validator("measure")
    @classmethod
    def _readable(cls, value: str) -> str:
        read_measure_source(value)
        return value

    @field_validator("launcher")
    @classmethod
    def _splits_into_words(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            shlex.split(value)
        except ValueError as problem:
            raise ValueError(
                f"launcher must be words as a shell reads them, got {value!r}: {problem}"
            ) from None
        return value

    @model_validator(mode="after")
    def _takes_seed_and_rate(self) -> Self:
        """Check that the script's words and the settings speak of the same things."""
        found = self.placeholders
        if "seed" not in found and not self.seed_by_run:
            raise ValueError(
                "script must take {seed} in its arguments, got none; add it, as in "
                "'--seed {seed}', or give --seed-by-run, which seeds before the script starts"
            )
        if "lr" in found and self.lr is None:
            raise ValueError("lr must be given when the script takes {lr}, such as --lr 0.001")
        if self.lr == AUTO:
            raise ValueError(
                "lr must be numbers for a script, got 'auto': only a workload has a rate of its "
                "own to start from; give some, such as --lr 3e-4,1e-3,3e-3"
            )
        if "lr" not in found and self.lr is not None:
            raise ValueError(
                "script must take {lr} in its arguments when --lr is given, got none; "
                "add it, as in '--learning_rate {lr}', or leave out --lr"
            )
        source = self.source
        if source.file and "out" not in found | set(PLACEHOLDER.findall(source.file)):
            raise ValueError(
                f"script must take {{out}} when --measure reads a file, got {source.file!r}; "
                "runs would write to the same one: add it, as in '--out_dir {out}'"
            )
        if source.kind == "mlflow" and self.tracker != "mlflow":
            raise ValueError(
                f"measure must not come from MLflow with --tracker {self.tracker}, got "
                f"{self.measure!r}; leave out --tracker"
            )
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from; `NO_RATE` alone where the script takes none."""
        return super().rates or (NO_RATE,)

    @property
    def placeholders(self) -> set[str]:
        """Which of {seed}, {lr}, {out} and {arm} the script's words hold."""
        return set(chain.from_iterable(map(PLACEHOLDER.findall, self.script)))

    @property
    def source(self) -> MeasureSource:
        """Where the measure comes from."""
        return read_measure_source(self.measure)

    @property
    def script_name(self) -> str:
        """Name of the script or module, without folders and ending."""
        if self.script[0] == "-m":
            return self.script[1] if len(self.script) > 1 else "module"
        return Path(self.script[0]).stem


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """Replace {seed}, {lr}, {out} and {arm}; other braces stay.

    Example:
        >>> filled_in("--lr={lr} {'a': 1}", {"lr": "0.1"})
        "--lr=0.1 {'a': 1}"
    """
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def comparison_settings_of(settings: Mapping[str, Any]) -> type[ComparisonSettings]:
    """Return which settings a folder or file of a comparison holds: of a script or a workload."""
    return ScriptConfig if "script" in settings else CompareConfig
