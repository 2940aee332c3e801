import csv
import io
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import regrad
import torch
import yaml
from regrad.correction import Control, Correction, Needs
from regrad_runner.comparing import compare as compare_module
from regrad_runner.comparing import running as module
from regrad_runner.comparing.compare import Plan, compare, make_plan
from regrad_runner.reporting.progress import Display
from regrad_runner.reporting.report import show_comparison
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import FIRST_TUNING_SEED, CompareConfig, TrainConfig
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload
from rich.console import Console

pytestmark = pytest.mark.usefixtures("without_page", "without_timing")
SMALL = {
    "epochs": 2,
    "train_size": 100,
    "batch_size": 25,
    "width": 4,
    "seeds": 2,
    "tracker": "none",
}
needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad"} <= regrad.available().keys(),
    reason="regrad-xgrad and regrad-powergrad are not installed",
)
BASELINE = Arm("baseline")
NESTEROV = Arm("nesterov", control=Control(name="nesterov", optimizer={"nesterov": True}))


@pytest.fixture
def plan(tmp_path):
    """Make a plan of the baseline and a control: two arms that need no plugin."""

    def make(*, arms=(BASELINE, NESTEROV), resume=False, name="out", **values) -> Plan:
        config = CompareConfig(**{**SMALL, "corrections": (), **values})
        made = make_plan(config, out=tmp_path / name, resume=resume)
        return Plan(made.config, made.workload, tuple(arms), made.path, reports=True, processes=1)

    return make


def run(plan) -> tuple[ResultsFolder, str]:
    text = io.StringIO()
    with Display(Console(file=text, width=200), runs=plan.runs) as display:
        return compare(plan, display), text.getvalue()


def outcomes(folder):
    return {
        (r.arm, r.seed): (r.status, r.value, r.validation, r.steps_to_target)
        for r in folder.results
    }


def test_every_arm_runs_on_every_seed_and_seeds_come_first(plan):
    folder, text = run(plan())
    assert [(r.seed, r.arm) for r in folder.results] == [
        (0, "baseline"),
        (0, "nesterov"),
        (1, "baseline"),
        (1, "nesterov"),
    ]
    assert {r.status for r in folder.results} == {"finished"}
    assert "[4/4] nesterov, seed 1: test accuracy" in text


def test_the_folder_holds_settings_rows_curves_receipts_and_figures(plan):
    path = run(plan())[0].path
    assert yaml.safe_load((path / "config.yaml").read_text())["epochs"] == 2
    with (path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    with (path / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 8
    receipt = json.loads((path / "runs" / "nesterov" / "1" / "receipt.json").read_text())
    assert (receipt["run"]["arm"], receipt["run"]["seed"], receipt["run"]["lr"]) == (
        "nesterov",
        1,
        0.05,
    )
    assert receipt["run"]["control"]["optimizer"] == {"nesterov": True}
    assert (receipt["corrections"], receipt["steps_applied"]) == ([], 8)
    assert {file.name for file in path.glob("*.png")} == {
        "curves.png",
        "steps.png",
        "comparison.png",
    }
    assert not list(path.rglob("*.part"))


def test_the_order_of_the_runs_changes_no_number(plan):
    forth, _ = run(plan(name="forth"))
    back, _ = run(plan(name="back", arms=(NESTEROV, Arm("baseline"))))
    assert outcomes(forth) == outcomes(back)


def stopped_after(monkeypatch, runs):
    """Let Ctrl-C come in the middle of the run after so many."""
    count = iter(range(100))

    class Stopping(TrainingRun):
        def train(self, *, on_point, on_step):
            if next(count) == runs:
                next(self.steps())
                raise KeyboardInterrupt
            super().train(on_point=on_point, on_step=on_step)

    monkeypatch.setattr(module, "TrainingRun", Stopping)


def test_a_stopped_comparison_goes_on_and_repeats_no_finished_run(plan, monkeypatch):
    whole, _ = run(plan(name="whole"))
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(plan())
    started = []
    original = TrainingRun.__init__

    def counting(self, config, workload, arm, *, seed, lr):
        started.append((arm.name, seed))
        original(self, config, workload, arm, seed=seed, lr=lr)

    monkeypatch.setattr(TrainingRun, "__init__", counting)
    monkeypatch.setattr(compare_module, "estimate_in_words", lambda *_: None)  # it makes runs
    resumed, text = run(plan(resume=True))
    assert started == [("nesterov", 1)]
    assert [line[:5] for line in text.splitlines()] == ["[4/4]"]
    assert outcomes(resumed) == outcomes(whole)


def test_more_seeds_and_corrections_are_added_and_nothing_is_repeated(plan, monkeypatch, tmp_path):
    original = TrainingRun.__init__
    started = []

    def counting(self, config, workload, arm, *, seed, lr):
        started.append((arm.name, seed))
        original(self, config, workload, arm, seed=seed, lr=lr)

    first, _ = run(plan(arms=(BASELINE,), seeds=2))
    before = outcomes(first)
    monkeypatch.setattr(TrainingRun, "__init__", counting)
    monkeypatch.setattr(compare_module, "estimate_in_words", lambda *_: None)  # it makes runs
    resumed, text = run(plan(arms=(BASELINE, NESTEROV), seeds=3, resume=True))
    assert started == [("nesterov", 0), ("nesterov", 1), ("baseline", 2), ("nesterov", 2)]
    assert [line[:5] for line in text.splitlines()] == ["[3/6]", "[4/6]", "[5/6]", "[6/6]"]
    assert before.items() <= outcomes(resumed).items()
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["seeds"] == 3


@needs_plugins
def test_a_correction_is_added_on_resume(tmp_path):
    def made(*corrections, resume):
        return make_plan(
            CompareConfig(**SMALL, corrections=corrections), out=tmp_path / "out", resume=resume
        )

    run(made("xgrad", resume=False))
    more = made("powergrad", "xgrad", resume=True)
    assert [arm.name for arm in more.arms] == [
        "baseline",
        "xgrad",
        "powergrad",
        "nesterov",
        "scaled-head",
    ]
    folder, _ = run(more)
    assert len(folder.results) == 10
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["corrections"] == [
        "xgrad",
        "powergrad",
    ]
    with pytest.raises(ValueError, match="out must hold the same configuration, got corrections"):
        made("powergrad", resume=True)


class Picky(Correction):
    """Refuse to be attached."""

    name = "picky"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        """Change nothing."""

    def setup(self, attachment):
        """Refuse."""
        raise regrad.RegradError("'picky' wants\nanother model")


class Late(Picky):
    """Refuse at the first step."""

    name = "late"

    def setup(self, attachment):
        """Allow it."""

    def correct_gradients(self, step):
        """Refuse."""
        raise ValueError("'late' found no layer that it could correct")


class Mild(Late):
    """Change little."""

    name = "mild"

    def correct_gradients(self, step):
        """Halve what is there."""
        for gradient in step.gradients:
            gradient.mul_(0.5)


@pytest.fixture
def installed(monkeypatch):
    """Install three corrections of which two cannot work, and a fourth that cannot be imported."""
    kinds = {kind.name: kind for kind in (Late, Mild, Picky)}

    def load(name, group="regrad"):
        if group != "regrad":
            return original(name, group)
        if name not in kinds:
            raise regrad.PluginLoadError(
                f"plugin {name!r} (x 1.0) could not be imported: No module named 'y'"
            )
        return kinds[name]

    def available(group="regrad"):
        return [*sorted(kinds), "torn"] if group == "regrad" else every(group)

    original, every = regrad.load, regrad.available
    monkeypatch.setattr("regrad.registry.load", load)
    monkeypatch.setattr(regrad, "load", load, raising=False)
    monkeypatch.setattr(regrad, "available", available, raising=False)


@pytest.mark.usefixtures("installed")
def test_all_stands_for_every_correction_that_works_here_and_says_which_do_not(tmp_path, capsys):
    config = CompareConfig(**{**SMALL, "seeds": 1, "epochs": 1}, corrections=("all",))
    state = torch.get_rng_state()
    made = make_plan(config, out=tmp_path / "out")
    assert [arm.name for arm in made.arms] == ["baseline", "mild"]
    assert dict(made.left_out) == {
        "late": "'late' found no layer that it could correct",
        "picky": "'picky' wants another model",
        "torn": "plugin 'torn' (x 1.0) could not be imported: No module named 'y'",
    }
    assert not (tmp_path / "out").exists()
    assert "left out: picky ('picky' wants another model)" in made.in_words().splitlines()
    run(made)
    torch.set_rng_state(state)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["corrections"] == ["mild"]
    show_comparison(tmp_path / "out")
    assert (
        "left out: late ('late' found no layer that it could correct)\n" in capsys.readouterr().out
    )
    show_comparison(tmp_path / "out", as_json=True)
    assert set(json.loads(capsys.readouterr().out)["left_out"]) == {"late", "picky", "torn"}
    again = make_plan(
        CompareConfig(**{**SMALL, "epochs": 1}, corrections=("mild",)),
        out=tmp_path / "out",
        resume=True,
    )
    assert set(again.left_out) == {"late", "picky", "torn"}


@pytest.mark.usefixtures("installed")
def test_all_leaves_what_is_named_beside_it_as_it_is_named(tmp_path):
    stack = CompareConfig(**SMALL, corrections=("mild", "all", "mild+mild"))
    with pytest.raises(regrad.RegradError, match="mild"):  # twice in one attachment
        make_plan(stack, out=tmp_path / "out")
    made = make_plan(CompareConfig(**SMALL, corrections=("mild", "all")), out=tmp_path / "out")
    assert [arm.name for arm in made.arms] == ["baseline", "mild"]


def test_a_run_that_fails_is_kept_as_failed_and_the_others_go_on(plan, monkeypatch):
    fails = Arm("fails", control=Control(name="fails", optimizer={"no_such_option": 1}))
    folder, text = run(plan(arms=(Arm("baseline"), fails, NESTEROV)))
    assert [(r.arm, r.status) for r in folder.results[:3]] == [
        ("baseline", "finished"),
        ("fails", "failed"),
        ("nesterov", "finished"),
    ]
    assert (
        "fails, seed 0 failed: ValueError: optimizer 'sgd' has no option 'no_such_option'" in text
    )
    assert "Traceback" in (folder.path / "failures.txt").read_text()
    assert len(folder.results) == 6


def test_a_failed_run_is_repeated_on_resume(plan):
    fails = Arm("nesterov", control=Control(name="fails", optimizer={"no_such_option": 1}))
    run(plan(arms=(Arm("baseline"), fails)))
    folder, _ = run(plan(resume=True))
    assert {r.status for r in folder.results} == {"finished"}
    assert len(folder.results) == 4


def statuses(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path / "mlflow.db")) as database:
        return dict(database.execute("select name, status from runs"))


def test_runs_are_tracked_under_their_comparison_and_a_failed_one_is_marked(plan):
    fails = Arm("fails", control=Control(name="fails", optimizer={"no_such_option": 1}))
    folder, _ = run(plan(arms=(Arm("baseline"), fails), seeds=1, tracker="mlflow"))
    assert statuses(folder.path) == {
        "out": "FAILED",
        "baseline, seed 0": "FINISHED",
        "fails, seed 0": "FAILED",
    }
    with closing(sqlite3.connect(folder.path / "mlflow.db")) as database:
        parents = database.execute(
            "select count(*) from tags where key = 'mlflow.parentRunId'"
        ).fetchone()
        curve = database.execute(
            "select count(*) from metrics where key = 'validation accuracy'"
        ).fetchone()
        tested = database.execute(
            "select count(*) from metrics where key = 'test accuracy'"
        ).fetchone()
    assert (parents, curve, tested) == ((2,), (8,), (1,))
    artifacts = {file.name for file in (folder.path / "artifacts").rglob("*") if file.is_file()}
    assert artifacts == {"receipt.json", "results.csv", "curves.png", "steps.png", "traceback.txt"}


def test_every_arm_chooses_among_the_same_learning_rates_on_seeds_of_its_own(plan):
    folder, text = run(plan(lr=[1e-5, 0.1], tuning_seeds=2, tuning_extensions=0))
    assert [(t.arm, t.lr, t.seed - FIRST_TUNING_SEED) for t in folder.trials] == [
        (arm, lr, seed) for arm in ("baseline", "nesterov") for lr in (1e-5, 0.1) for seed in (0, 1)
    ]
    assert {r.lr for r in folder.results} == {0.1}
    assert "[12/12]" in text
    assert len(ResultsFolder(folder.path).trials) == 8


# What a trial's validation loss is made to be: the best rate lies above those given for one arm,
# and below them for the other.
GRID = {"lr": [0.01, 0.03], "tuning_seeds": 2}
BEST_RATES = {"baseline": 0.2, "nesterov": 0.004}
ADDED = {"baseline": [0.09, 0.27, 0.81], "nesterov": [0.00333, 0.00111]}


@pytest.fixture
def known_best_rates(monkeypatch):
    """Let trials end with values that depend on arm and rate alone; count the runs that began."""
    began = []
    original = TrainingRun.train

    def train(self, *, on_point, on_step):
        began.append((self.arm.name, self.lr, self.seed))
        distance = abs(math.log(self.lr / BEST_RATES[self.arm.name]))
        original(self, on_point=lambda p: on_point(replace(p, value=-distance)), on_step=on_step)
        self.position.points[-1] = replace(self.position.points[-1], value=-distance)

    monkeypatch.setattr(TrainingRun, "train", train)
    return began


def trials_in_order(added=ADDED):
    """Return arm, rate and seed of each trial, as the tables have them."""
    rates = [(arm, lr) for arm in ADDED for lr in GRID["lr"]]
    for number in range(3):
        rates += [(arm, added[arm][number]) for arm in ADDED if number < len(added[arm])]
    return [(arm, lr, FIRST_TUNING_SEED + seed) for arm, lr in rates for seed in (0, 1)]


def test_an_arm_whose_best_rate_is_at_an_edge_tries_rates_beyond_it(plan, known_best_rates):
    folder, text = run(plan(**GRID))
    assert [(t.arm, t.lr, t.seed) for t in folder.trials] == trials_in_order()
    assert {result.arm: result.lr for result in folder.results} == {
        "baseline": 0.27,
        "nesterov": 0.00333,
    }
    assert "[22/22]" in text  # 8 trials of the rates given, 10 of those added, 4 runs
    assert len(known_best_rates) == 22
    assert folder.missing == []
    assert not any(choice.at_edge for choice in folder.choices.values())


@pytest.mark.usefixtures("known_best_rates")
def test_an_arm_that_still_ends_at_an_edge_says_so_and_the_folder_knows(plan, capsys):
    folder, _ = run(plan(**GRID, tuning_extensions=1))
    show_comparison(folder.path)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "baseline: its best learning rate 0.09 is the largest that it tried; a larger one may be "
        "better nesterov: its best learning rate 0.00333 is the smallest that it tried; a smaller "
        "one may be better" in printed
    )
    show_comparison(folder.path, as_json=True)
    assert json.loads(capsys.readouterr().out)["learning_rates"]["nesterov"] == {
        "tried": [0.00333, 0.01, 0.03],
        "added": [0.00333],
        "chosen": 0.00333,
        "at_edge": True,
    }
    again = ResultsFolder(folder.path)
    assert [(t.arm, t.lr, t.seed) for t in again.trials] == trials_in_order()[:12]
    assert {arm: (c.best, c.at_edge) for arm, c in again.choices.items()} == {
        "baseline": (0.09, True),
        "nesterov": (0.00333, True),
    }
    assert again.missing == []


@pytest.mark.long
@pytest.mark.parametrize("runs", [3, 9, 13, 17, 19])
def test_a_stopped_choice_of_rates_goes_on_and_repeats_nothing(
    plan, known_best_rates, monkeypatch, runs
):
    with monkeypatch.context() as patch:
        stopped_after(patch, runs)
        with pytest.raises(KeyboardInterrupt):
            run(plan(**GRID))
    assert len(known_best_rates) == runs
    folder, text = run(plan(**GRID, resume=True))
    assert "[22/22]" in text
    assert [(t.arm, t.lr, t.seed) for t in folder.trials] == trials_in_order()
    assert len(set(known_best_rates)) == len(known_best_rates) == 22


def test_the_test_images_are_looked_at_once_per_run_and_not_in_trials(plan, monkeypatch):
    looked_at = []
    original = TrainingRun.value_on

    def counting(self, images):
        looked_at.append(images is self.workload.test)
        return original(self, images)

    monkeypatch.setattr(TrainingRun, "value_on", counting)
    run(plan(lr=[0.05, 0.1], tuning_seeds=1, tuning_extensions=0))
    assert sum(looked_at) == 4


@needs_plugins
def test_the_arms_without_flags_are_the_two_corrections_their_stack_and_their_controls(tmp_path):
    made = make_plan(CompareConfig(), out=tmp_path / "out")
    assert [arm.name for arm in made.arms] == [
        "baseline",
        "powergrad",
        "xgrad",
        "xgrad+powergrad",
        "scaled-head",
        "nesterov",
        "nesterov+scaled-head",
    ]
    assert (made.config.seeds, made.config.epochs, made.runs) == (10, 20, 70)
    assert not (tmp_path / "out").exists()


@needs_plugins
def test_corrections_that_cannot_work_are_refused_before_anything_is_written(tmp_path):
    config = CompareConfig(optimizer="sgd:momentum=0.9,nesterov=true")
    with pytest.raises(regrad.RegradError, match="look ahead twice"):
        make_plan(config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_plugins
def test_corrections_show_their_effect(plan, capsys):
    arms = (Arm("baseline"), Arm("xgrad", ("xgrad",), must_beat="nesterov"), NESTEROV)
    folder, _ = run(plan(arms=arms, seeds=1))
    assert [r.touched for r in folder.results] == [False, True, False]
    show_comparison(folder.path, as_json=True)
    summaries = json.loads(capsys.readouterr().out)["arms"]
    assert [s["verdict"] for s in summaries] == ["baseline", "too few seeds", "control"]
    assert summaries[1]["control"] == "nesterov"


def test_two_sets_of_baseline_runs_with_different_seeds_are_no_evidence():
    digits = load_workload("digits", train_size=300)
    config = resolved(TrainConfig(epochs=3, width=8, threads=1, evaluations_per_epoch=2), digits)

    def row(arm, pair, seed):
        with closing(TrainingRun(config, digits, Arm("baseline"), seed=seed, lr=0.05)) as run:
            run.train(on_point=lambda point: None, on_step=lambda step: None)
            value = run.value_on(digits.test)
        return RunRow(arm=arm, seed=pair, value=value, step_seconds=1.0, touched=True)

    rows = [row("baseline", pair, pair) for pair in range(6)] + [
        row("again", pair, 100 + pair) for pair in range(6)
    ]
    assert len({r.value for r in rows}) > 2
    assert summarize(rows, controls={})[1].verdict == "no evidence"
