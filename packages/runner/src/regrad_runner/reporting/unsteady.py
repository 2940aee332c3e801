"""What can be run where an arm is unsteady: the comparison with the next lower learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from regrad_runner.results.folder import ResultsFolder
from regrad_runner.statistics.verdicts import ArmSummary

DEFAULT_FACTOR = 2.0  # between rates where only one was tried


@dataclass(frozen=True, kw_only=True)
class LowerRate:
    """An offer to compare at the next lower learning rate.

    Attributes:
        arm: Name of the unsteady arm.
        lr: Its learning rate.
        next_lr: The next lower one.
        command: That compares with it.
    """

    arm: str
    lr: float
    next_lr: float
    command: str


def lower_rates(folder: ResultsFolder, summaries: Sequence[ArmSummary]) -> list[LowerRate]:
    """Return an offer for each unsteady arm.

    Args:
        folder: The comparison, whose trials say which rates were tried.
        summaries: Its arms.
    """
    rates = {result.arm: result.lr for result in folder.results}
    tried = sorted({trial.lr for trial in folder.trials})
    offers = []
    for summary in summaries:
        if summary.unsteady and rates[summary.arm] > 0:
            lr = rates[summary.arm]
            next_lr = next_lower(lr, tried)
            command = _command(folder.path, next_lr)
            offers.append(LowerRate(arm=summary.arm, lr=lr, next_lr=next_lr, command=command))
    return offers


def next_lower(lr: float, tried: Sequence[float]) -> float:
    """Return the next lower learning rate.

    Args:
        lr: A rate.
        tried: The rates of the grid, rising; none if there was no choice.

    Returns:
        The next lower rate of the grid. Below its lowest one, and without a grid, the rate that
        continues it; by halves where there is none.

    Example:
        >>> next_lower(0.03, [0.003, 0.01, 0.03]), next_lower(0.1, [0.1, 0.4]), next_lower(0.1, [])
        (0.01, 0.025, 0.05)
    """
    lower = [rate for rate in tried if rate < lr]
    if lower:
        return lower[-1]
    if len(tried) > 1:
        return _shortened(lr * tried[0] / tried[1])
    return _shortened(lr / DEFAULT_FACTOR)


def _shortened(rate: float) -> float:
    """Return a rate as it is written, without what rounding left."""
    return float(f"{rate:.6g}")


def in_words(offer: LowerRate) -> str:
    """Say what can be run."""
    return (
        f"{offer.arm} is unsteady at learning rate {offer.lr:g}; compare at the next lower one: "
        f"{offer.command}"
    )


def _command(path: Path, lr: float) -> str:
    """Return the command that repeats a comparison with one learning rate in another folder."""
    config = quote(str(path / "config.yaml"))
    out = quote(f"{path}-lr-{lr:g}")
    return f"regrad compare --config {config} --lr {lr:g} --out {out}"
