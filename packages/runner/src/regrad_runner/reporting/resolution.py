"""How finely a measure can tell arms apart, given its number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrad_runner.reporting.numbers import short_number
from regrad_runner.workloads.workload import Measure

FEW_SAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """How many samples a comparison looked at.

    Attributes:
        samples: What they are.
        validation: Number of those for tuning and curves.
        test: Number of those that the verdicts rest on.
        one_validation_sample: What one of these is worth in the measure; None unless the measure
            is the share of samples that are right.
        one_test_sample: As above.
        warning: What few samples mean; empty if there are enough.
    """

    samples: str
    validation: int
    test: int
    one_validation_sample: float | None
    one_test_sample: float | None
    warning: str


def resolution_of(about: Mapping[str, Any], measure: Measure) -> Resolution | None:
    """Return the resolution of a comparison; None if its folder does not say it.

    Args:
        about: What the folder says about itself.
        measure: What was compared.

    Example:
        >>> about = {"samples": "images", "sizes": {"train": 800, "validation": 200, "test": 400}}
        >>> found = resolution_of(about, Measure())
        >>> found.one_test_sample, found.warning[:22]
        (0.0025, 'only 200 images for va')
    """
    sizes = about.get("sizes") or {}
    validation = sizes.get("validation", 0)
    test = sizes.get("test", 0)
    if validation < 1 or test < 1:
        return None
    samples = about.get("samples") or "samples"
    return Resolution(
        samples=samples,
        validation=validation,
        test=test,
        one_validation_sample=1 / validation if measure.counts_samples else None,
        one_test_sample=1 / test if measure.counts_samples else None,
        warning=_warning(samples, validation, test),
    )


def resolution_in_words(resolution: Resolution, measure: Measure) -> str:
    """Say how many samples there were and what one is worth.

    Example:
        >>> about = {"samples": "images", "sizes": {"train": 800, "validation": 200, "test": 400}}
        >>> resolution_in_words(resolution_of(about, Measure()), Measure())
        'validation: 200 images, one is worth .0050; test: 400 images, one is worth .0025'
    """
    validation = f"validation: {resolution.validation:,} {resolution.samples}"
    test = f"test: {resolution.test:,} {resolution.samples}"
    if resolution.one_validation_sample is not None:
        validation += f", one is worth {short_number(resolution.one_validation_sample, measure)}"
    if resolution.one_test_sample is not None:
        test += f", one is worth {short_number(resolution.one_test_sample, measure)}"
    return f"{validation}; {test}"


def _warning(samples: str, validation: int, test: int) -> str:
    """Say what few samples mean, for the splits that are small."""
    consequences = {
        "validation": (validation, "learning rates are chosen by chance"),
        "test": (test, "the verdicts hold for these few"),
    }
    parts = [
        f"only {count:,} {samples} for {split}: {consequence}"
        for split, (count, consequence) in consequences.items()
        if count < FEW_SAMPLES
    ]
    return "; ".join(parts)
