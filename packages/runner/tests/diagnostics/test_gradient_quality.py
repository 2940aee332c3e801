"""Gradient quality, against gradients taken by hand, and a run that does not notice."""

import csv
import io
import json
import math
import os
import sqlite3
from contextlib import closing
from dataclasses import asdict

import numpy as np
import pytest
import regrad
import torch
from accelerate.state import AcceleratorState
from regrad.correction import Control, Correction, Needs
from regrad_runner.comparing import running
from regrad_runner.comparing.compare import Plan, compare, make_plan
from regrad_runner.diagnostics import gradient_quality as probing
from regrad_runner.diagnostics.gradient_quality import Probe, Quality, mean_qualities
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import show_comparison
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import CompareConfig
from regrad_runner.training import building
from regrad_runner.training import run as training
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload, make_model
from regrad_testing import run_on_processes
from rich.console import Console
from torch import nn

pytestmark = pytest.mark.usefixtures("without_page")
BASELINE = Arm("baseline")
HALVED = Arm("halve", ("halve",))
needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad"} <= regrad.available().keys(),
    reason="regrad-xgrad and regrad-powergrad are not installed",
)


class Halve(Correction):
    """Halve every gradient."""

    name = "halve"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        for gradient in step.gradients:
            gradient.mul_(0.5)


class Move(Correction):
    """Move every weight for the forward pass."""

    name = "move"
    needs = Needs(stages=("weights",))

    def predict_weights(self, step):
        return [0.05 * parameter.detach().sign() for parameter in step.parameters]


class Noisy(Correction):
    """Draw from the global random state, as no correction should."""

    name = "noisy"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        for gradient in step.gradients:
            gradient.add_(torch.randn_like(gradient), alpha=0.01)


OWN = {kind.name: kind for kind in (Halve, Move, Noisy)}


@pytest.fixture(autouse=True)
def own_corrections(monkeypatch):
    """Let arms name the corrections above."""
    installed = training.create_all

    def chosen(arm):
        return (
            [OWN[name]() for name in arm.corrections]
            if {*arm.corrections} <= {*OWN}
            else installed(arm)
        )

    monkeypatch.setattr(training, "create_all", chosen)


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits", train_size=100)


@pytest.fixture
def config(digits):
    def make(**values):
        small = {
            "batch_size": 20,
            "epochs": 2,
            "width": 4,
            "threads": 1,
            "evaluations_per_epoch": 2,
            "norm": "group",
        }
        return resolved(CompareConfig(**{**small, **values}), digits)

    return make


def probed(config, workload, arm, *, every=3, size=60, seed=0):
    """Train to the end; return probes, points, weights and buffers."""
    found = []
    with closing(TrainingRun(config, workload, arm, seed=seed, lr=0.05)) as run:
        probe = Probe(run, every=every, size=size) if every else None
        run.train(
            on_point=lambda point: None,
            on_step=lambda step: found.append(probe and probe.finish_step()),
        )
        return [q for q in found if q], run.position.points, dict(run.model.state_dict())


def by_hand(model, images, labels, *, parts=1, dtype=torch.float64):
    """Return the mean gradient of the plain loss as one vector."""
    model.zero_grad()
    for x, y in zip(
        images.split(len(images) // parts), labels.split(len(labels) // parts), strict=True
    ):
        (nn.functional.cross_entropy(model(x.to(dtype)), y) / parts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def quality_by_hand(gradient, large):
    cosine = (gradient @ large / gradient.norm() / large.norm()).item()
    return cosine, (gradient.norm() / large.norm()).item()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_first_probe_is_what_gradients_by_hand_say(digits, config, norm):
    settings = config(norm=norm)
    (first, *_), _, _ = probed(settings, digits, Arm("move", ("move",)), every=1)
    with closing(TrainingRun(settings, digits, BASELINE, seed=0, lr=0.05)) as run:
        images, labels = run.next_batch()
        model = run.model
    order = np.random.default_rng(probing.LARGE_BATCH_SEED).permutation(100)[:60]
    large = by_hand(
        model,
        *digits.train.with_seed(probing.LARGE_BATCH_SEED).__getitems__(order.tolist()),
        parts=3,
    )
    raw = by_hand(model, images, labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.sign())
    moved = by_hand(model, images, labels)
    assert (first.arm, first.seed, first.step) == ("move", 0, 1)
    expected = [*quality_by_hand(raw, large), *quality_by_hand(moved, large)]
    got = [
        first.cosine_raw,
        first.norm_ratio_raw,
        first.cosine_corrected,
        first.norm_ratio_corrected,
    ]
    assert got == pytest.approx(expected, abs=1e-12)
    assert abs(expected[0] - expected[2]) > 1e-4


@pytest.mark.usefixtures("in_float64")
def test_without_a_correction_both_gradients_are_one(digits, config):
    qualities, _, _ = probed(config(), digits, BASELINE)
    assert [q.step for q in qualities] == [3, 6, 9]
    for quality in qualities:
        assert quality.cosine_corrected == pytest.approx(quality.cosine_raw, abs=1e-14)
        assert quality.norm_ratio_corrected == pytest.approx(quality.norm_ratio_raw, abs=1e-14)


@pytest.mark.usefixtures("in_float64")
def test_half_a_gradient_has_its_direction_and_half_its_norm(digits, config):
    for quality in probed(config(), digits, HALVED)[0]:
        assert quality.cosine_corrected == pytest.approx(quality.cosine_raw, abs=1e-14)
        assert quality.norm_ratio_corrected == pytest.approx(quality.norm_ratio_raw / 2, abs=1e-14)


@pytest.mark.usefixtures("in_float64")
def test_a_batch_as_large_as_the_large_one_but_of_other_images_has_a_cosine_below_one(
    digits, config
):
    """The same samples would have one: augmentation and order are drawn apart from the run's."""
    (quality, *_), _, _ = probed(config(batch_size=100), digits, BASELINE, every=1, size=100)
    assert 0.5 < quality.cosine_raw < 0.9999


@pytest.mark.parametrize(
    "arm", [BASELINE, Arm("noisy", ("noisy",)), Arm("move", ("move",))], ids=lambda arm: arm.name
)
@pytest.mark.parametrize("values", [{"norm": "batch"}, {"norm": "batch", "accumulate": 2}], ids=str)
def test_probing_changes_no_bit_of_the_run(digits, config, arm, values):
    _, points, state = probed(config(**values), digits, arm, every=None)
    qualities, probed_points, probed_state = probed(config(**values), digits, arm, every=2)
    assert len(qualities) == 5
    assert probed_points == points
    assert state.keys() == probed_state.keys()
    assert any("running_mean" in name for name in state)
    assert [name for name in state if not torch.equal(state[name], probed_state[name])] == []


class Dropping(nn.Module):
    """A model that draws random numbers in its forward pass."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10, dtype=torch.float64)

    def forward(self, images):
        return self.fc(nn.functional.dropout(images.flatten(1), 0.5))


def test_dropout_is_that_of_the_step_and_the_run_draws_what_it_would(digits, config, monkeypatch):
    monkeypatch.setattr(building, "make_model", lambda *args, **kwargs: Dropping())
    _, points, state = probed(config(), digits, BASELINE, every=None)
    qualities, probed_points, probed_state = probed(config(), digits, BASELINE)
    assert probed_points == points
    assert torch.equal(state["fc.weight"], probed_state["fc.weight"])
    for quality in qualities:
        assert quality.cosine_raw == pytest.approx(quality.cosine_corrected, abs=1e-14)
        assert quality.norm_ratio_raw == pytest.approx(quality.norm_ratio_corrected, abs=1e-14)


@pytest.mark.usefixtures("in_float64")
def test_parts_of_a_batch_are_probed_like_the_whole(digits, config):
    whole, _, _ = probed(config(), digits, Arm("move", ("move",)))
    parts, _, _ = probed(config(accumulate=4), digits, Arm("move", ("move",)))
    for one, other in zip(whole, parts, strict=True):
        assert list(one.measures.values()) == pytest.approx(
            list(other.measures.values()), abs=1e-12
        )


@pytest.mark.usefixtures("fresh_precision")
def test_mixed_precision_is_that_of_the_run(digits, config):
    exact = probed(config(), digits, BASELINE)[0]
    AcceleratorState._reset_state(True)
    rounded = probed(config(mixed_precision="bf16"), digits, BASELINE)[0]
    for quality in rounded:
        assert quality.cosine_corrected == pytest.approx(quality.cosine_raw, abs=1e-6)
        assert quality.norm_ratio_corrected == pytest.approx(quality.norm_ratio_raw, abs=1e-6)
    assert abs(exact[0].cosine_raw - rounded[0].cosine_raw) > 1e-5


def test_a_fused_optimizer_that_is_to_divide_by_the_scale_itself_is_read_as_divided(digits, config):
    with closing(TrainingRun(config(), digits, BASELINE, seed=0, lr=0.05)) as run:
        probe, optimizer = Probe(run, every=1, size=20), run.attachment.optimizer
        for parameter in run.attachment.model.parameters():
            parameter.grad = torch.full_like(parameter, 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        probe._keep(optimizer)
        assert all(bool((g == 2).all()) for g in probe._corrected)
        probe._corrected, optimizer.found_inf = [], torch.tensor(1.0)
        probe._keep(optimizer)
        assert probe.finish_step() is None


def test_a_zero_gradient_has_no_direction_and_does_not_spoil_the_mean(digits):
    assert all(map(math.isnan, probing._against([torch.ones(2)], [torch.zeros(2)])))
    cosine, ratio = probing._against([torch.zeros(2), None], [torch.ones(2), torch.ones(1)])
    assert math.isnan(cosine)
    assert ratio == 0
    rows = [
        Quality(
            arm="a",
            seed=0,
            step=s,
            cosine_raw=c,
            cosine_corrected=math.nan,
            norm_ratio_raw=1,
            norm_ratio_corrected=2,
        )
        for s, c in ((1, 0.25), (2, math.nan), (3, 0.75))
    ]
    assert mean_qualities(rows) == [
        {
            **{"arm": "a", "probes": 3, "cosine_raw": 0.5, "cosine_corrected": None},
            **{"norm_ratio_raw": 1, "norm_ratio_corrected": 2},
        }
    ]


SMALL = {
    "epochs": 2,
    "train_size": 100,
    "batch_size": 25,
    "width": 4,
    "seeds": 2,
    "tracker": "none",
}


@pytest.fixture
def plan(tmp_path):
    def make(*, resume=False, name="out", arms=(BASELINE, HALVED), **values):
        config = CompareConfig(**{**SMALL, "corrections": (), **values})
        made = make_plan(config, out=tmp_path / name, resume=resume)
        return Plan(made.config, made.workload, arms, made.path, reports=True, processes=1)

    return make


def run(plan):
    with Display(Console(file=io.StringIO()), runs=plan.runs) as display:
        return compare(plan, display)


def rows_of(folder):
    with (folder.path / probing.QUALITY_FILE).open() as file:
        return [(row["arm"], int(row["seed"]), int(row["step"])) for row in csv.DictReader(file)]


def outcomes(folder):
    return [(r.arm, r.seed, r.value, r.validation, r.steps_to_target) for r in folder.results]


def test_a_comparison_keeps_probes_and_shows_their_means_and_its_results_are_the_same(plan, capsys):
    plain, with_probes = run(plan(name="plain")), run(plan(probe_every=4, probe_size=50))
    assert outcomes(plain) == outcomes(with_probes)
    assert not (plain.path / probing.QUALITY_FILE).exists()
    expected = [
        (arm, seed, step) for seed in (0, 1) for arm in ("baseline", "halve") for step in (4, 8)
    ]
    assert rows_of(with_probes) == expected
    show_comparison(with_probes.path, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    means = {mean["arm"]: mean for mean in shown["gradient_quality"]}
    assert means["baseline"]["probes"] == 4
    assert means["halve"]["norm_ratio_corrected"] == pytest.approx(
        means["halve"]["norm_ratio_raw"] / 2, rel=1e-4
    )
    show_comparison(with_probes.path)
    said = capsys.readouterr().out
    assert "norm ratio" in said
    assert f"{means['halve']['norm_ratio_corrected']:.3f}" in said
    show_comparison(plain.path)
    assert "norm ratio" not in capsys.readouterr().out


def test_a_resumed_comparison_has_the_probes_of_every_run_once(plan, monkeypatch):
    whole, started = run(plan(name="whole", probe_every=4)), iter(range(9))

    class Stopping(TrainingRun):
        def train(self, *, on_point, on_step):
            if next(started) == 2:
                for step in self.steps():
                    on_step(step)
                    if step == 5:
                        raise KeyboardInterrupt
            super().train(on_point=on_point, on_step=on_step)

    with monkeypatch.context() as patch:
        patch.setattr(running, "TrainingRun", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(plan(probe_every=4))
    assert len(rows_of(ResultsFolder(whole.path.parent / "out"))) == 4
    resumed = run(plan(probe_every=4, resume=True))
    assert rows_of(resumed) == rows_of(whole)
    assert probing.kept_qualities(resumed) == probing.kept_qualities(whole)


def test_a_failed_run_leaves_no_probes_and_its_repetition_does(plan):
    broken = Arm("halve", control=Control(name="broken", optimizer={"no_such_option": 1}))
    run(plan(probe_every=4, arms=(BASELINE, broken)))
    folder = run(plan(probe_every=4, resume=True))
    assert len(rows_of(folder)) == len(set(rows_of(folder))) == 8


def test_probes_are_curves_of_the_tracked_run_and_an_artifact_of_the_comparison(plan):
    folder = run(plan(probe_every=4, seeds=1, tracker="mlflow"))
    with closing(sqlite3.connect(folder.path / "mlflow.db")) as database:
        query = (
            "select step from metrics where key = 'gradient quality/cosine corrected' order by step"
        )
        steps = [step for (step,) in database.execute(query)]
    assert steps == [4, 4, 8, 8]
    assert [p.name for p in (folder.path / "artifacts").rglob(probing.QUALITY_FILE)] == [
        probing.QUALITY_FILE
    ]


def test_trials_of_learning_rates_are_not_probed(plan):
    folder = run(plan(probe_every=4, lr=[0.05, 0.1], tuning_seeds=1, seeds=1))
    assert len(rows_of(folder)) == 4


def test_a_large_batch_smaller_than_a_step_is_refused_before_anything_is_written(plan, tmp_path):
    with pytest.raises(ValueError, match=r"probe_size must be at least 25 .*got 24"):
        plan(probe_every=4, probe_size=24)
    assert list(tmp_path.iterdir()) == []


def float64_model(*args, **kwargs):
    return make_model(*args, **kwargs).double()


def probes_of_one_of_two(rank):
    """Train as one of two processes; return what its probes measured."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    building.make_model = float64_model
    digits = load_workload("digits", train_size=100)
    asked = CompareConfig(
        batch_size=20,
        epochs=1,
        width=4,
        threads=1,
        evaluations_per_epoch=2,
        norm="group",
        accumulate=2,
        processes=2,
    )
    found = []
    with closing(TrainingRun(resolved(asked, digits), digits, BASELINE, seed=0, lr=0.05)) as run:
        probe = Probe(run, every=2, size=60)
        run.train(
            on_point=lambda point: None, on_step=lambda step: found.append(probe.finish_step())
        )
    return [asdict(quality) for quality in found if quality]


@pytest.mark.usefixtures("in_float64")
def test_two_processes_probe_like_one_and_agree(digits, config):
    first, second = run_on_processes(probes_of_one_of_two)
    assert first == second
    one, _, _ = probed(config(epochs=1), digits, BASELINE, every=2)
    assert [q["step"] for q in first] == [q.step for q in one] == [2, 4]
    for theirs, ours in zip(first, one, strict=True):
        assert [theirs[name] for name in probing.QUALITY_MEASURES] == pytest.approx(
            list(ours.measures.values()), abs=1e-12
        )


@needs_plugins
def test_xgrad_is_compared_at_its_moved_weights_and_powergrad_by_its_own_logit_gradient(
    digits, config
):
    for name in ("xgrad", "powergrad"):
        first, *_ = probed(config(), digits, Arm(name, (name,)), every=2)[0]
        assert first.cosine_corrected != pytest.approx(first.cosine_raw, abs=1e-4)
