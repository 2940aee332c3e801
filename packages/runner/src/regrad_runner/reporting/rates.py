"""What is said about the choice of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad_runner.results.rates import RateChoice


def rates_at_edges(choices: Mapping[str, RateChoice]) -> list[str]:
    """Return a line for each arm whose best rate is the smallest or the largest of those tried.

    Args:
        choices: What the trials say, by arm.

    Example:
        >>> rates_at_edges({"agc": RateChoice((0.1, 0.3, 0.9), (0.9,), best=0.9)})
        ['agc: its best learning rate 0.9 is the largest that it tried; a larger one may be better']
    """
    lines = []
    for arm, choice in choices.items():
        if not choice.at_edge:
            continue
        word = "largest" if choice.best == choice.tried[-1] else "smallest"
        further = "larger" if word == "largest" else "smaller"
        lines.append(
            f"{arm}: its best learning rate {choice.best:g} is the {word} that it tried; "
            f"a {further} one may be better"
        )
    return lines


def rates_as_json(choices: Mapping[str, RateChoice]) -> dict[str, Any]:
    """Return the choice for programs, by arm.

    Args:
        choices: What the trials say, by arm.

    Returns:
        For each arm "tried", the rates in order of size; "added", those of them beyond the rates
        given; "chosen", or None while trials are missing; "at_edge", whether that is the smallest
        or the largest tried.
    """
    return {
        arm: {
            "tried": list(choice.tried),
            "added": list(choice.added),
            "chosen": choice.best,
            "at_edge": choice.at_edge,
        }
        for arm, choice in choices.items()
    }
