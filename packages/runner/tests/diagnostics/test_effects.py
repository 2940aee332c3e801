import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from regrad.correction import Correction, Needs
from regrad_runner.diagnostics.effects import Effect, EffectTrace, keep_effects, kept_effects
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.run import begin_run
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import CompareConfig
from regrad_runner.training import run as training
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

SMALL = {
    "epochs": 2,
    "train_size": 100,
    "batch_size": 25,
    "width": 4,
    "seeds": 1,
    "tracker": "none",
}
NUMBERS = {
    "share_touched": 1.0,
    "relative_change": 0.5,
    "cosine": 1.0,
    "trigger_rate": 1.0,
    "non_finite": 0.0,
}


class Fading(Correction):
    """Multiply gradients by a half in the first three steps and by three quarters after them."""

    name = "fading"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        """Scale them."""
        for gradient in step.gradients:
            gradient.mul_(0.5 if step.index < 3 else 0.75)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(training, "create_all", lambda arm: [Fading()] if arm.corrections else [])
    config = CompareConfig(**SMALL, corrections=())
    workload = load_workload("digits", train_size=100)

    def make(*corrections):
        arm = Arm("+".join(corrections) or "baseline", corrections=corrections)
        return closing(TrainingRun(resolved(config, workload), workload, arm, seed=3, lr=0.05))

    return make


def test_each_look_sees_what_came_since_the_last_one(run):
    with run("fading") as made:
        trace, looks = EffectTrace(made), []
        for step in made.steps():
            if step in (2, 6, 8):
                looks += trace.look()
        whole = made.attachment.receipt()["effects"]["fading"]["gradient"]
    assert [(row.arm, row.seed, row.step, row.correction, row.stage) for row in looks] == [
        ("fading", 3, step, "fading", "gradient") for step in (2, 6, 8)
    ]
    # Steps 1 to 3 change by a half, 4 to 8 by a quarter: the second look sees one of the first and three of the others.
    assert [row.relative_change for row in looks] == pytest.approx(
        [0.5, (0.5 + 3 * 0.25) / 4, 0.25], abs=1e-5
    )
    assert whole["relative_change"] == pytest.approx((3 * 0.5 + 5 * 0.25) / 8, abs=1e-5)
    assert {row.trigger_rate for row in looks} == {1.0}
    assert [row.cosine for row in looks] == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_look_without_a_measured_step_sees_nothing(run):
    with run("fading") as made:
        trace = EffectTrace(made)
        assert trace.look() == []
        next(made.steps())
        assert len(trace.look()) == 1
        assert trace.look() == []


def test_looking_changes_no_result(run):
    def weights(*, looks):
        with run("fading") as made:
            trace = EffectTrace(made)
            for _ in made.steps():
                if looks:
                    trace.look()
            return [p.detach().clone() for p in made.model.parameters()]

    assert all(map(torch.equal, weights(looks=True), weights(looks=False)))


def test_effects_are_kept_run_by_run_and_read_back(tmp_path):
    rows = [
        Effect(arm="agc", seed=seed, step=8, correction="agc", stage="gradient", **NUMBERS)
        for seed in (0, 1)
    ]
    again = replace(rows[0], cosine=math.pi / 4)

    def keep(row, *, ends=True):
        values = {"name": "agc", "arm": "agc", "seed": row.seed, "lr": 0.1}
        with begin_run(tmp_path, values) as record:
            keep_effects(record, [row])
            if ends:
                record.end("finished", result=numbers_of(Result(arm="agc", seed=row.seed)))

    keep(rows[0])
    keep(rows[1], ends=False)
    assert kept_effects(ResultsFolder(tmp_path)) == rows[:1]
    keep(again)
    assert kept_effects(ResultsFolder(tmp_path)) == [again]


def test_training_time_grows_from_evaluation_to_evaluation_and_makes_no_two_of_them_different(run):
    with run() as made:
        made.train(on_point=lambda point: None, on_step=lambda step: None)
        points, seconds = made.position.points, made.seconds
    times = [point.seconds for point in points]
    assert times[0] > 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(seconds)
    assert points[0] == replace(points[0], seconds=None)
