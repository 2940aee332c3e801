import math
import textwrap
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from matplotlib.image import imread
from regrad_runner.reporting.figures import png
from regrad_runner.reporting.figures.curves import ZOOM_NOTE, measure_curves
from regrad_runner.reporting.figures.drawing import draw_plain
from regrad_runner.reporting.figures.png import write_pngs
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.results.outcomes import CurvePoint, Result
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.workloads.workload import Measure

ARMS = ("baseline", "xgrad", "agc:axis=[0,1]$", "nesterov")
SEEDS = 7
CONTROLS = {"xgrad": "nesterov", "agc:axis=[0,1]$": None}


def point(arm, seed, step, value):
    return CurvePoint(arm=arm, seed=seed, step=step, epoch=step / 10, loss=1.0, value=value, lr=0.1)


def final(arm, seed):
    return 0.9 + 0.01 * ARMS.index(arm) + 0.003 * math.sin(seed + 2 * ARMS.index(arm))


@pytest.fixture
def rows():
    return [
        Result(
            arm=arm,
            seed=seed,
            value=final(arm, seed),
            steps_to_target=None if (arm, seed) == ("xgrad", 2) else 60 + seed,
            step_seconds=0.1,
            touched=True,
        )
        for arm in ARMS
        for seed in range(SEEDS)
    ]


@pytest.fixture
def curves():
    return [
        point(arm, seed, step, final(arm, seed) * (1 - math.exp(-step / 20)))
        for arm in ARMS
        for seed in range(SEEDS)
        for step in range(10, 101, 10)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are drawn, in the order of their files."""
    figures = []
    draw = png.draw_alone

    def keep(drawings):
        figures.append(draw(drawings))
        return figures[-1]

    monkeypatch.setattr(png, "draw_alone", keep)
    return figures


def summaries_of(rows, *, target=0.9):
    return summarize([row.as_run_row() for row in rows], controls=CONTROLS, target=target)


def data_of(curves, rows, *, target=0.9):
    return ReportData(
        folder=SimpleNamespace(results=rows, curves=curves),
        measure=Measure(target=target),
        summaries=summaries_of(rows, target=target),
        effects=[],
        qualities=[],
        about={},
        settings={},
        receipts={},
    )


def write(curves, rows, out, *, target=0.9):
    return write_pngs(data_of(curves, rows, target=target), out)


def line_of(axes, arm):
    return next(line for line in axes.lines if line.get_label() == f"\u200b{arm}")


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_three_pictures_are_written_and_hold_something(curves, rows, tmp_path):
    paths = write(curves, rows, tmp_path / "new")
    assert [path.name for path in paths] == ["curves.png", "steps.png", "comparison.png"]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_a_curve_is_the_median_over_seeds(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    line = line_of(drawn[0].axes[0], "xgrad")
    at_the_end = sorted(row.value for row in curves if row.arm == "xgrad" and row.step == 100)
    assert list(line.get_xdata()) == list(range(10, 101, 10))
    assert line.get_ydata()[-1] == pytest.approx(at_the_end[SEEDS // 2])


def test_the_picture_and_the_page_show_the_same_marks_on_the_same_axes(
    curves, rows, tmp_path, drawn
):
    write(curves, rows, tmp_path)
    (drawing,) = measure_curves(data_of(curves, rows))
    on_page = draw_plain(drawing).axes[0]
    for axes in (drawn[0].axes[0], drawn[2].axes[1]):
        assert axes.get_ylim() == on_page.get_ylim()
        for arm in ARMS:
            assert line_of(axes, arm).get_xydata().tolist() == (
                line_of(on_page, arm).get_xydata().tolist()
            )


def test_a_picture_says_what_it_shows_within_its_edges(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    for figure in drawn:
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert axes.get_title(loc="left")
            caption = axes.texts[-1]
            assert len(caption.get_text()) > 60
            box = caption.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 <= box.y1 <= axes.bbox.y0
    assert ZOOM_NOTE in textwrap.fill(drawn[0].axes[0].texts[-1].get_text(), 1000)


def test_steps_that_a_seed_lacks_are_left_out(curves, rows, tmp_path, drawn):
    short = [row for row in curves if (row.arm, row.seed, row.step) != ("xgrad", 3, 100)]
    write(short, rows, tmp_path)
    line = line_of(drawn[0].axes[0], "xgrad")
    assert list(line.get_xdata()) == list(range(10, 91, 10))


def test_intervals_and_means_are_those_of_the_summaries(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    summary = next(s for s in summaries_of(rows) if s.arm == "xgrad")
    differences = drawn[2].axes[0]
    shown = [tuple(line.get_xdata()) for line in differences.lines]
    assert (summary.difference,) * 2 in shown
    assert summary.interval in shown
    names = ["xgrad", "nesterov", "agc:axis=[0,1]$"]  # the control under its correction
    words = ["better than nothing", "control", "better"]
    named = [text for pair in zip(names, words, strict=True) for text in pair]
    assert texts_of(differences)[:-1] == named  # the last one is the caption


def test_a_control_has_the_colour_of_its_arm_in_dashes(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    lines = {arm: line_of(drawn[0].axes[0], arm) for arm in ARMS}
    assert (
        lines["nesterov"].get_color() == lines["xgrad"].get_color() != lines["baseline"].get_color()
    )
    assert lines["nesterov"].get_linestyle() == "--"
    assert lines["xgrad"].get_linestyle() == "-"
    assert len({lines[arm].get_color() for arm in ARMS}) == 3


def test_a_missed_target_stands_behind_every_hit(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    axes = drawn[1].axes[0]
    misses = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"]
    assert len(misses) == 1
    assert misses[0] > max(row.steps_to_target for row in rows if row.steps_to_target)
    assert texts_of(axes)[:4] == ["baseline", "xgrad", "1.00×, 1 of 7 missed", "agc:axis=[0,1]$"]


def test_without_a_target_there_is_no_picture_of_steps(curves, rows, tmp_path):
    assert [path.name for path in write(curves, rows, tmp_path, target=None)] == [
        "curves.png",
        "comparison.png",
    ]


def test_a_baseline_alone_has_nothing_to_compare(curves, rows, tmp_path):
    alone = [row for row in rows if row.arm == "baseline"]
    assert [path.name for path in write(curves, alone, tmp_path)] == ["curves.png", "steps.png"]


def test_runs_that_all_failed_leave_nothing_to_draw(tmp_path):
    rows = [Result(arm="baseline", seed=0, value=math.nan, step_seconds=0.1, status="failed")]
    assert write([], rows, tmp_path) == []


def test_one_seed_and_one_evaluation_can_be_drawn(tmp_path):
    rows = [Result(arm=arm, seed=0, value=0.5, step_seconds=0.1) for arm in ("baseline", "xgrad")]
    curves = [point(arm, 0, 10, 0.5) for arm in ("baseline", "xgrad")]
    assert len(write(curves, rows, tmp_path)) == 3


def test_drawing_changes_no_global_setting(curves, rows, tmp_path):
    def settings():
        return {
            name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"
        }  # chosen when first read

    before = settings()
    write(curves, rows, tmp_path)
    assert settings() == before
