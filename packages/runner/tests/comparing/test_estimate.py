from dataclasses import replace

import pytest
from regrad_runner.comparing import estimate
from regrad_runner.comparing.estimate import estimate_in_words
from regrad_runner.comparing.plan import make_plan
from regrad_runner.results.outcomes import Result
from regrad_runner.settings.config import CompareConfig

SETTINGS = {
    "epochs": 2,
    "train_size": 75,
    "batch_size": 25,
    "width": 4,
    "seeds": 4,
    "evaluations_per_epoch": 1,
    "corrections": ("agc",),
    "controls": False,
}


class Runs:
    """A folder with results and no trials."""

    trials = ()

    def __init__(self, *statuses):
        self.results = [Result(arm="agc", seed=0, status=status) for status in statuses]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(CompareConfig(**SETTINGS), out=tmp_path_factory.mktemp("estimate") / "out")


@pytest.fixture
def slow(monkeypatch):
    """Let every step take a second."""
    monkeypatch.setattr(estimate, "_seconds_of_arm", lambda plan, arm, rate: 1.0)


# By hand: 2 epochs of 3 steps; 2 evaluations of 360 images and one of 360 count as
# .25 · 1080 / 25 = 10.8 steps; the time per step is measured at 66 steps for 8 runs, 8.25 each.
# So a run is 25.05 seconds, and 8 runs are 3.34 minutes.
@pytest.mark.usefixtures("slow")
def test_an_estimate_counts_steps_evaluations_and_the_time_per_step(plan):
    said = "this will take about {}, estimated from a few steps"
    assert estimate_in_words(plan, Runs()) == said.format("3.3 minutes")
    assert estimate_in_words(replace(plan, jobs=2), Runs()) == said.format("1.7 minutes")


@pytest.mark.usefixtures("slow")
def test_runs_that_ended_are_not_counted_and_failed_ones_run_again(plan):
    assert "2.5 minutes" in estimate_in_words(plan, Runs("finished", "diverged", "failed"))
    assert estimate_in_words(plan, Runs(*["finished"] * 8)) is None


def test_several_processes_estimate_nothing(plan):
    assert estimate_in_words(replace(plan, processes=2), Runs()) is None


@pytest.mark.parametrize("problem", [RuntimeError("out of memory"), ZeroDivisionError()])
def test_what_cannot_be_measured_is_not_estimated(plan, monkeypatch, problem):
    def fail(*arguments, **options):
        raise problem

    monkeypatch.setattr(estimate, "TrainingRun", fail)
    assert estimate_in_words(plan, Runs()) is None


def test_slow_steps_are_tried_with_the_first_arm_alone(plan, monkeypatch):
    monkeypatch.setattr(estimate, "LONGEST_TRIAL_SECONDS", 0.0)
    tried = []

    def note(plan, arm, rate):
        tried.append(arm.name)
        return 1.0

    monkeypatch.setattr(estimate, "_seconds_of_arm", note)
    estimate_in_words(plan, Runs())
    assert tried == ["baseline"]


def test_steps_are_really_measured(plan):
    seconds = estimate._seconds_of_arm(plan, plan.arms[0], 0.05)
    assert 0 < seconds < 60
