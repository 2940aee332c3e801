"""How an arm looks: its colour, marker and dashes are the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrad_runner.statistics.verdicts import ArmSummary

# After Okabe and Ito, distinct with every common colour blindness. The three light ones are darker
# here, so that each has a contrast of at least 3 to white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B85C93", "#A87000", "#3A8FC4")
INK = "#1F2328"
QUIET = "#666666"
GRID = "#E6E6E6"
PAPER = "#FFFFFF"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ((), (5, 2), (1, 1.6), (5, 1.6, 1, 1.6))
CONTROL_DASHES = DASHES[1]
SECOND_ROUND_DASHES = DASHES[3]  # of arms beyond the colours of the palette
BASELINE_ROLE = "ink"
UNCLAIMED_ROLE = "quiet"  # of a control that no arm must beat


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an arm is drawn.

    Attributes:
        role: Name of its colour: "arm-1" to "arm-6", "ink" or "quiet".
        marker: In matplotlib's letters.
        control: Whether it is a control: dashed, with hollow markers and without a band.
        dashes: Lengths of dashes and gaps, in line widths; empty for a solid line.
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
    """Return the colours on white by role; the page has others in its dark theme."""
    arms = {f"arm-{number}": colour for number, colour in enumerate(PALETTE, start=1)}
    return {"ink": INK, "quiet": QUIET, "grid": GRID, "paper": PAPER, **arms}


def arm_styles(summaries: Sequence[ArmSummary]) -> dict[str, Style]:
    """Return the style of each arm; a control has the colour of the first arm that must beat it.

    Colours and markers repeat with different periods, so 42 corrections have different pairs of
    them.
    """
    styles = {summary.arm: _style_without_colour(summary) for summary in summaries}
    corrected = [summary for summary in summaries if summary.verdict not in ("baseline", "control")]
    for index, summary in enumerate(corrected):
        style = _style_of_correction(index)
        styles[summary.arm] = style
        control = summary.control
        if control in styles and styles[control].role == UNCLAIMED_ROLE:
            styles[control] = replace(style, control=True, dashes=CONTROL_DASHES)
    return styles


def _style_without_colour(summary: ArmSummary) -> Style:
    """Return how the baseline looks, and every other arm as long as it has no colour."""
    if summary.verdict == "baseline":
        return Style(role=BASELINE_ROLE)
    return Style(role=UNCLAIMED_ROLE, control=True, dashes=CONTROL_DASHES)


def _style_of_correction(index: int) -> Style:
    """Return how the correction at a place among the corrections looks."""
    return Style(
        role=f"arm-{index % len(PALETTE) + 1}",
        marker=MARKERS[(index + 1) % len(MARKERS)],
        dashes=SECOND_ROUND_DASHES if index >= len(PALETTE) else (),
    )
