"""How arms look in figures: one colour, marker and line each, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrad_runner.statistics.verdicts import ArmSummary

# After Okabe and Ito, distinct with every common colour blindness; the three light ones are darker here, so that each
# has a contrast of at least 3 to white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B85C93", "#A87000", "#3A8FC4")
INK, QUIET, GRID, PAPER = "#1F2328", "#666666", "#E6E6E6", "#FFFFFF"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ((), (5, 2), (1, 1.6), (5, 1.6, 1, 1.6))
BASELINE, PLAIN = "ink", "quiet"  # roles of the baseline, and of a control that no arm must beat


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an arm is drawn.

    Attributes:
        role: Name of its colour: "arm-1" to "arm-6", "ink" or "quiet".
        marker: In matplotlib's letters.
        control: Whether it is a control: dashed, hollow and without a band.
        dashes: Lengths of dashes and gaps; none for a whole line.
    """

    role: str
    marker: str = "o"
    control: bool = False
    dashes: tuple[float, ...] = ()

    @property
    def colour(self) -> str:
        """The colour on white."""
        return colours()[self.role]


def colours() -> dict[str, str]:
    """Return the colours on white by role; in a dark theme the page gives the roles other ones."""
    arms = {f"arm-{number}": colour for number, colour in enumerate(PALETTE, start=1)}
    return {"ink": INK, "quiet": QUIET, "grid": GRID, "paper": PAPER, **arms}


def arm_styles(summaries: Sequence[ArmSummary]) -> dict[str, Style]:
    """Return the style of each arm: a control has the colour of the first arm that must beat it.

    Colours and markers repeat at different periods: 42 corrections have different pairs of them.
    """
    styles = {
        summary.arm: Style(role=BASELINE)
        if summary.verdict == "baseline"
        else Style(role=PLAIN, control=True, dashes=DASHES[1])
        for summary in summaries
    }
    corrected = [summary for summary in summaries if summary.verdict not in ("baseline", "control")]
    for index, summary in enumerate(corrected):
        style = Style(
            role=f"arm-{index % len(PALETTE) + 1}", marker=MARKERS[(index + 1) % len(MARKERS)]
        )
        styles[summary.arm] = replace(style, dashes=DASHES[3] if index >= len(PALETTE) else ())
        if summary.control in styles and styles[summary.control].role == PLAIN:
            styles[summary.control] = replace(style, control=True, dashes=DASHES[1])
    return styles
