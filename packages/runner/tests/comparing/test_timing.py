import io
import json
from dataclasses import replace

import pytest
from regrad_runner.comparing import timing
from regrad_runner.comparing.compare import compare
from regrad_runner.comparing.plan import make_plan
from regrad_runner.comparing.timing import time_steps
from regrad_runner.diagnostics.step_times import FEWEST_PAIRS, StepTime, kept_step_times
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import show_comparison
from regrad_runner.settings.arms import BASELINE
from regrad_runner.settings.config import CompareConfig
from regrad_runner.statistics.steps import median_end
from rich.console import Console

pytestmark = pytest.mark.usefixtures("without_page")
SETTINGS = {
    "epochs": 1,
    "train_size": 75,
    "batch_size": 25,
    "width": 4,
    "seeds": 2,
    "evaluations_per_epoch": 3,
    "tracker": "none",
    "corrections": ("agc",),
    "controls": False,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(CompareConfig(**SETTINGS), out=tmp_path_factory.mktemp("timing") / "out")


@pytest.fixture(scope="module")
def compared(plan):
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrad_runner.reporting.page.write.write_page", lambda *arguments: [])
        with Display(Console(file=text, width=200), runs=plan.runs) as display:
            folder = compare(plan, display)
    return folder, text.getvalue()


def display():
    text = io.StringIO()
    return Display(Console(file=text, width=200), runs=0), text


def test_a_comparison_ends_with_the_time_per_step_of_every_arm_but_the_baseline(compared):
    folder, said = compared
    times = kept_step_times(folder.path)
    assert times.keys() == {"agc"}
    assert times["agc"].pairs >= FEWEST_PAIRS
    assert said.splitlines()[-1].startswith("measuring each arm's time per step")


def test_what_was_measured_is_not_measured_again(compared, plan, monkeypatch):
    folder, _ = compared
    monkeypatch.setattr(timing, "measure_step_times", lambda *arguments: pytest.fail("measured"))
    shown, text = display()
    time_steps(plan, folder, shown)
    assert text.getvalue() == ""


def test_several_processes_measure_nothing(compared, plan, monkeypatch):
    folder, _ = compared
    monkeypatch.setattr(timing, "kept_step_times", lambda path: {})
    monkeypatch.setattr(timing, "measure_step_times", lambda *arguments: pytest.fail("measured"))
    time_steps(replace(plan, processes=2), folder, display()[0])


def test_a_measurement_that_fails_is_said_and_ends_nothing(compared, plan, monkeypatch):
    folder, _ = compared

    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timing, "kept_step_times", lambda path: {})
    monkeypatch.setattr(timing, "measure_step_times", fail)
    shown, text = display()
    time_steps(plan, folder, shown)
    assert "time per step of agc is unknown: out of memory" in text.getvalue()


def test_json_and_table_take_what_was_measured_and_count_steps_to_the_baseline(
    compared, monkeypatch, capsys
):
    folder, _ = compared
    found = StepTime(ratio=1.25, interval=None, pairs=30, seconds=0.1, baseline_seconds=0.08)
    monkeypatch.setattr(
        "regrad_runner.reporting.summaries.kept_step_times", lambda path: {"agc": found}
    )
    show_comparison(folder.path, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    baseline, agc = shown["arms"]
    assert (baseline["time_ratio"], agc["time_ratio"]) == (None, 1.25)
    ends = [
        [(point.step, point.value) for point in folder.curves if (point.arm, point.seed) == run]
        for run in ((BASELINE, 0), (BASELINE, 1))
    ]
    assert baseline["target"] == agc["target"] == pytest.approx(median_end(ends))
    assert shown["measure"]["target"] == "baseline"
    assert shown["resolution"]["test"] == 360
    show_comparison(folder.path)
    text = capsys.readouterr().out
    assert "1.25×" in text
    assert "test: 360 images, one is worth .0028" in text


def test_a_job_array_has_no_times_and_says_why(compared, monkeypatch, capsys):
    folder, _ = compared
    monkeypatch.setattr("regrad_runner.reporting.summaries.kept_step_times", lambda path: {})
    about = json.loads((folder.path / "about.json").read_text())
    (folder.path / "about.json").write_text(json.dumps({**about, "job_array": True}))
    show_comparison(folder.path)
    assert "step times are unknown: the runs were jobs of an array" in capsys.readouterr().out
