"""Figures as SVG files with their own colours, and the outlines of their markers."""

from __future__ import annotations

import io

import matplotlib as mpl
from matplotlib.figure import Figure

HASH_SALT = "regrad"  # of matplotlib's names of shapes: the same figure is the same file
# Outlines of the markers about the origin, in a box of about 10 units.
SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4 4.4 3.6h-8.8z",
    "D": "M0-4.8 4.8 0 0 4.8-4.8 0z",
    "v": "M0 4.4 4.4-3.6h-8.8z",
    "P": "M-1.6-4.4h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "X": (
        "M-4.2-2.1-2.1-4.2 0-2.1 2.1-4.2 4.2-2.1 2.1 0 4.2 2.1 2.1 4.2 0 2.1-2.1 4.2-4.2 2.1-2.1 0z"
    ),
}


def as_svg(figure: Figure, *, title: str) -> str:
    """Return a figure as the text of an SVG file, the same for the same figure."""
    text = io.StringIO()
    metadata = {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": HASH_SALT}):
        figure.savefig(text, format="svg", facecolor="white", metadata=metadata)
    return text.getvalue()
