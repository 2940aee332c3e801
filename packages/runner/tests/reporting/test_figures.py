import math
from typing import NamedTuple

import matplotlib as mpl
import pytest
from matplotlib.image import imread
from regrad_runner.reporting import figures
from regrad_runner.reporting.figures import write_figures
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.workloads.workload import Measure

ARMS = ("none", "xgrad", "agc:axis=[0,1]$", "nesterov")
SEEDS = 7
CONTROLS = {"xgrad": "nesterov", "agc:axis=[0,1]$": None}


class CurveRow(NamedTuple):
    arm: str
    seed: int
    step: int
    value: float


def final(arm, seed):
    return 0.9 + 0.01 * ARMS.index(arm) + 0.003 * math.sin(seed + 2 * ARMS.index(arm))


@pytest.fixture
def rows():
    return [
        RunRow(
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
        CurveRow(arm, seed, step, final(arm, seed) * (1 - math.exp(-step / 20)))
        for arm in ARMS
        for seed in range(SEEDS)
        for step in range(10, 101, 10)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved, by file name."""
    saved = {}
    save = figures._save

    def keep(figure, path):
        saved[path.stem] = figure
        return save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return saved


def write(curves, rows, out, *, target=0.9):
    measure = Measure(target=target)
    return write_figures(
        curves, out, rows=rows, summaries=summarize(rows, controls=CONTROLS), measure=measure
    )


def test_three_pictures_are_written_and_hold_something(curves, rows, tmp_path):
    paths = write(curves, rows, tmp_path / "new")
    assert [path.name for path in paths] == ["curves.png", "steps.png", "comparison.png"]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_a_curve_is_the_median_over_seeds(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    line = next(line for line in drawn["curves"].axes[0].lines if line.get_label() == "xgrad")
    at_the_end = sorted(row.value for row in curves if row.arm == "xgrad" and row.step == 100)
    assert list(line.get_xdata()) == list(range(10, 101, 10))
    assert line.get_ydata()[-1] == pytest.approx(at_the_end[SEEDS // 2])


def test_steps_that_a_seed_lacks_are_left_out(curves, rows, tmp_path, drawn):
    short = [row for row in curves if (row.arm, row.seed, row.step) != ("xgrad", 3, 100)]
    write(short, rows, tmp_path)
    line = next(line for line in drawn["curves"].axes[0].lines if line.get_label() == "xgrad")
    assert list(line.get_xdata()) == list(range(10, 91, 10))


def test_intervals_and_means_are_those_of_the_summaries(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    summary = next(s for s in summarize(rows, controls=CONTROLS) if s.arm == "xgrad")
    right = drawn["comparison"].axes[1]
    places = [label.get_text() for label in right.get_yticklabels()]
    assert places == ["xgrad", "agc:axis=[0,1]$", "nesterov"]
    shown = [tuple(line.get_xdata()) for line in right.lines]
    assert (summary.difference,) in shown
    assert summary.interval in shown
    assert [text.get_text() for text in right.texts] == ["better than nothing", "better", "control"]


def test_a_control_has_the_colour_of_its_arm_in_dashes(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    lines = {line.get_label(): line for line in drawn["curves"].axes[0].lines}
    assert lines["nesterov"].get_color() == lines["xgrad"].get_color() != lines["none"].get_color()
    assert lines["nesterov"].get_linestyle() == "--"
    assert lines["xgrad"].get_linestyle() == "-"
    assert len({lines[arm].get_color() for arm in ARMS}) == 3


def test_a_missed_target_stands_behind_every_hit(curves, rows, tmp_path, drawn):
    write(curves, rows, tmp_path)
    axes = drawn["steps"].axes[0]
    misses = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"]
    assert len(misses) == 1
    assert misses[0] > max(row.steps_to_target for row in rows if row.steps_to_target)
    assert [text.get_text() for text in axes.texts] == ["missed"]


def test_without_a_target_there_is_no_picture_of_steps(curves, rows, tmp_path):
    assert [path.name for path in write(curves, rows, tmp_path, target=None)] == [
        "curves.png",
        "comparison.png",
    ]


def test_a_baseline_alone_has_nothing_to_compare(curves, rows, tmp_path):
    alone = [row for row in rows if row.arm == "none"]
    assert [path.name for path in write(curves, alone, tmp_path)] == ["curves.png", "steps.png"]


def test_runs_that_all_failed_leave_nothing_to_draw(tmp_path):
    rows = [RunRow(arm="none", seed=0, value=math.nan, step_seconds=0.1, status="failed")]
    assert write([], rows, tmp_path) == []


def test_one_seed_and_one_evaluation_can_be_drawn(tmp_path):
    rows = [RunRow(arm=arm, seed=0, value=0.5, step_seconds=0.1) for arm in ("none", "xgrad")]
    curves = [CurveRow(arm, 0, 10, 0.5) for arm in ("none", "xgrad")]
    assert len(write(curves, rows, tmp_path)) == 3


def test_drawing_changes_no_global_setting(curves, rows, tmp_path):
    def settings():
        return {
            name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"
        }  # chosen when first read

    before = settings()
    write(curves, rows, tmp_path)
    assert settings() == before
