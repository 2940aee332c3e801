"""From numbers to places in a figure: the ends of its axes, and their ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.ticker import LogLocator, MaxNLocator

from regrad_runner.reporting.figures.marks import Drawing, Mark

ZOOMED_FROM = 0.5  # share of training after which the vertical axis is scaled
MARGIN = 0.05  # share of an axis beyond its outermost mark
EDGE = 1.08  # where runs without a value stand, as a multiple of the largest value
ROUND_STEPS = [1, 2, 5, 10]  # between ticks, times a power of ten
MINUS = "−"


@dataclass(frozen=True, kw_only=True)
class AxisScale:
    """An axis.

    Attributes:
        low: Its lower end.
        high: Its upper end, above the lower one.
        log: Whether it is logarithmic; both ends are positive then.
    """

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value stands: 0 at the lower end, 1 at the upper one.

        Example:
            >>> AxisScale(low=0, high=10).share(2), AxisScale(low=1, high=100, log=True).share(10)
            (0.2, 0.5)
        """
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int, *, whole: bool = False) -> list[tuple[float, str]]:
        """Return round values on the axis, with how they are written.

        Args:
            most: How many there may be.
            whole: Whether they must be whole numbers.

        Example:
            >>> [text for _, text in AxisScale(low=-0.12, high=0.03).ticks(4)]
            ['−0.10', '−0.05', '0.00']
        """
        if self.log:
            found = LogLocator(numticks=most).tick_values(self.low, self.high)
            inside = [float(value) for value in found if self.low <= value <= self.high]
            return [(value, f"{value:g}") for value in inside]
        found = MaxNLocator(most, steps=ROUND_STEPS, integer=whole).tick_values(self.low, self.high)
        inside = [float(value) for value in found if self.low <= value <= self.high]
        decimals = _decimals(float(found[1] - found[0]))
        return [(value + 0.0, _written(value, decimals)) for value in inside]


def value_scale(drawing: Drawing) -> AxisScale:
    """Return the vertical axis of curves, in which arms that are far off may lie outside."""
    if drawing.span is not None:
        return AxisScale(low=drawing.span[0], high=drawing.span[1])
    shown: list[float] = []
    for series in drawing.styles:
        marks = drawing.marks_of(series)
        if marks and series not in drawing.far_off:
            shown += _numbers(_late_marks(marks) if drawing.zoomed else marks)
    scale = _with_margin(shown, log=drawing.log)
    if drawing.reference is None:
        return scale
    return AxisScale(low=min(scale.low, drawing.reference), high=max(scale.high, drawing.reference))


def step_scale(drawing: Drawing) -> AxisScale:
    """Return the horizontal axis of curves."""
    places = [mark.x for mark in drawing.marks if mark.x is not None]
    return _with_margin(places, log=False)


def row_scale(drawing: Drawing) -> AxisScale:
    """Return the horizontal axis of rows, in which arms that are far off lie outside."""
    near = [mark for mark in drawing.marks if mark.series not in drawing.far_off]
    places = [mark.x for mark in near if mark.x is not None]
    for mark in near:
        places += [end for end in (mark.low, mark.high) if end is not None]
    if drawing.reference is not None:
        places.append(drawing.reference)
    if drawing.kind == "bars":
        return AxisScale(low=0.0, high=1.04 * max(places))
    if _has_open_end(near):
        places.append(edge_of(drawing))
    return _with_margin(places, log=False)


def edge_of(drawing: Drawing) -> float:
    """Return where runs without a value stand: behind every other."""
    values = [mark.x for mark in drawing.marks if mark.x is not None]
    values += [mark.high for mark in drawing.marks if mark.high is not None]
    return EDGE * max(values, default=1.0)


def _has_open_end(marks: Iterable[Mark]) -> bool:
    """Say whether any run has no value, or any interval no end."""
    return any(mark.x is None or (mark.low is not None and mark.high is None) for mark in marks)


def _late_marks(marks: list[Mark]) -> list[Mark]:
    """Return the marks in the second half of training."""
    end = marks[-1].x or 0.0
    return [mark for mark in marks if (mark.x or 0.0) >= ZOOMED_FROM * end]


def _numbers(marks: Iterable[Mark]) -> list[float]:
    """Return the heights of marks and of the ends of their bands."""
    found: list[float] = []
    for mark in marks:
        found += [value for value in (mark.low, mark.y, mark.high) if value is not None]
    return found


def _with_margin(values: list[float], *, log: bool) -> AxisScale:
    """Return an axis that holds the values with some room at both ends."""
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if log:
        room = (high / low) ** MARGIN
        return AxisScale(low=low / room, high=high * room, log=True)
    room = MARGIN * (high - low)
    if room == 0:
        room = MARGIN * abs(high) if high else 1.0
    return AxisScale(low=low - room, high=high + room)


def _decimals(step: float) -> int:
    """Return how many digits after the point tell neighbouring ticks apart."""
    digits = 0
    while digits < 12 and not math.isclose(step * 10**digits, round(step * 10**digits)):
        digits += 1
    return digits


def _written(value: float, decimals: int) -> str:
    """Return a tick's number with a minus sign, and with none if it rounds to zero."""
    text = f"{value + 0.0:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)
