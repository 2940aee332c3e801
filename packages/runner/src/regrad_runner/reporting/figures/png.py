"""The figures of a comparison as PNG, for where the page does not fit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from regrad_runner.files import make_folder, write_whole
from regrad_runner.reporting.figures.curves import measure_curves
from regrad_runner.reporting.figures.drawing import draw_alone
from regrad_runner.reporting.figures.marks import Drawing
from regrad_runner.reporting.figures.rows import difference_rows, target_rows
from regrad_runner.reporting.report_data import ReportData

PIXELS_PER_INCH = 160


def write_pngs(data: ReportData, out: Path) -> list[Path]:
    """Write three figures of the page as PNG files, each with its title and caption.

    `curves.png` has the measure on the validation split against optimizer steps, `steps.png` the
    steps to the target if there is one, and `comparison.png` the paired differences from the
    baseline and beside them the curves.

    Args:
        data: The comparison.
        out: Folder, made if need be; files of these names are replaced.

    Returns:
        The files written; a figure without anything to show is left out.
    """
    make_folder(out)
    curves = measure_curves(data)
    differences = difference_rows(data)
    pictures = {"curves.png": curves, "steps.png": target_rows(data)}
    if curves and differences:
        pictures["comparison.png"] = [*differences, *curves]
    return [_write_png(drawings, out / name) for name, drawings in pictures.items() if drawings]


def _write_png(drawings: Sequence[Drawing], path: Path) -> Path:
    picture = io.BytesIO()
    draw_alone(drawings).savefig(picture, dpi=PIXELS_PER_INCH, format="png")
    write_whole(path, picture.getvalue())
    return path
