from contextlib import closing

import pytest
import regrad
import torch
from regrad.correction import Correction, Needs
from regrad_runner.checkpoints.checkpoint import random_state
from regrad_runner.diagnostics.explaining import effects_of, explain, relations
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import run as training
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

needs_plugins = pytest.mark.skipif(
    not {"xgrad", "gcw", "agc", "centralization", "adanorm"} <= regrad.available().keys(),
    reason="the corrections of this repository are not installed",
)
VALUES = {"batch_size": 25, "epochs": 2, "width": 4, "threads": 1, "train_size": 100}


class Weights(Correction):
    """Halve the gradients of weights and keep a copy of them; do nothing in another stage."""

    name = "weights"
    needs = Needs(
        stages=("gradient", "moment"), before=("agc",), conflicts={"xgrad": "a reason of its own"}
    )

    def __init__(self):
        super().__init__()
        self.kept = {}

    def selects(self, name, parameter):
        return name.endswith("weight")

    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            if self.selects(name, gradient):
                self.kept[name] = gradient.clone()
                gradient.mul_(0.5)

    def correct_moments(self, step):
        pass


class Later(Weights):
    """The same, but not in the first steps."""

    name = "later"
    needs = Needs(stages=("gradient", "moment"), warmup_steps=5)

    def correct_gradients(self, step):
        if step.index >= 5:
            super().correct_gradients(step)


@pytest.fixture
def own(monkeypatch):
    """Attach corrections of this file in place of an arm's."""

    def use(*corrections):
        monkeypatch.setattr(training, "create_all", lambda arm: [kind() for kind in corrections])

    return use


@pytest.fixture
def run():
    config = TrainConfig(**VALUES)
    digits = load_workload("digits", train_size=100)
    with closing(TrainingRun(resolved(config, digits), digits, Arm("own"), seed=0, lr=0.05)) as run:
        yield run


def explained(**values):
    return explain(TrainConfig(**{**VALUES, **values}))


def test_rows_have_shapes_reasons_and_hand_worked_numbers(own):
    own(Weights)
    (one,) = explained().corrections
    rows = {row["tensor"]: row for row in one.rows}
    assert {row["stage"] for row in one.rows} == {"gradient"}  # in the other it did nothing
    assert rows["fc.weight"] == {
        **{"stage": "gradient", "tensor": "fc.weight", "shape": [10, 16], "why": "changed"},
        **{"relative_change": pytest.approx(0.5), "cosine": pytest.approx(1.0)},
    }
    assert rows["fc.bias"]["relative_change"] == 0
    assert rows["fc.bias"]["why"] == "unchanged: not one of its tensors"
    assert len(one.changed) == sum(name.endswith("weight") for name in rows)
    assert one.version == "local"


def test_what_has_not_begun_says_when_it_will(own):
    own(Later)
    (one,) = explained().corrections
    whys = {row["tensor"]: row["why"] for row in one.rows}
    assert whys["fc.weight"] == "unchanged: it begins after 5 steps"
    assert whys["fc.bias"] == "unchanged: not one of its tensors"
    assert not any("may have changed" in note for note in one.notes)


def test_memory_and_time_are_those_of_the_correction(own):
    own(Weights)
    explanation = explained()
    (one,) = explanation.corrections
    assert one.cost.state_bytes == sum(4 * torch.Size(row["shape"]).numel() for row in one.changed)
    assert one.cost.window_bytes == 0
    assert 0 < one.cost.seconds < explanation.step_seconds
    assert one.cost.share_of_step == pytest.approx(
        one.cost.seconds / explanation.plain_step_seconds
    )


@needs_plugins
def test_a_window_keeps_as_many_bytes_as_the_weights_have():
    (one,) = explained(corrections=("xgrad",)).corrections
    weights = sum(4 * torch.Size(row["shape"]).numel() for row in one.rows)
    assert one.cost.state_bytes == 0
    # Beside the weights it keeps up to 64 values of each tensor, to notice what others write.
    samples = sum(4 * min(64, torch.Size(row["shape"]).numel()) for row in one.rows)
    assert weights < one.cost.window_bytes <= weights + samples


def test_the_effects_change_nothing_of_the_run(own, monkeypatch):
    config = TrainConfig(**VALUES)
    digits = load_workload("digits", train_size=100)
    own(Weights)
    results = []
    for asking in (False, True):
        with closing(
            TrainingRun(resolved(config, digits), digits, Arm("own"), seed=0, lr=0.05)
        ) as run:
            for _ in run.steps():
                if asking:
                    before = random_state()
                    effects_of(run) if run.position.step < run.total_steps else None
                    assert torch.equal(before["torch"], random_state()["torch"])
                    assert before["python"] == random_state()["python"]
            moments = [
                state["momentum_buffer"] for state in run.attachment.optimizer.state.values()
            ]
            results.append(
                [
                    *run.model.state_dict().values(),
                    *moments,
                    *run.attachment.corrections[0].kept.values(),
                ]
            )
            measured = run.attachment.metrics()
        results[-1].append(torch.tensor(list(measured.values())))
    assert len(results[0]) > 60
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("steps", [0, 3, 4, 5, 7])
def test_any_step_can_be_explained_also_the_first_of_an_epoch(own, steps):
    own(Weights)
    (one,) = explain(TrainConfig(**VALUES), after_steps=steps).corrections
    assert one.changed


def test_the_batch_after_an_epoch_is_the_first_of_the_next(run):
    for step in run.steps():
        if step == 4:
            ahead = run.next_batch()
        if step == 5:
            break
    run.position.batch = 0
    again = run.next_batch()
    assert run.position.epoch == 1
    assert torch.equal(ahead[0], again[0])
    assert torch.equal(ahead[1], again[1])


@needs_plugins
def test_relations_come_from_both_sides_declarations():
    refuses, ordered = relations(Weights())
    assert refuses == {"xgrad": "a reason of its own"}
    assert ordered == {"agc": "'agc' acts after 'weights': 'weights' declares before 'agc'"}
    refuses, ordered = relations(regrad.create("gcw"), beside=["agc"])
    assert refuses["xgrad"] == "both own the look-ahead"
    assert ordered["clip-norm"] == "'clip-norm' acts after 'gcw': 'gcw' declares before 'clip-norm'"
    assert "'centralization' declares before 'gcw'" in ordered["centralization"]
    assert "agc" not in ordered
    assert relations(regrad.create("gcw:allow_double_lookahead=true"))[0].get("xgrad") is None


def test_a_composition_that_contains_a_correction_is_not_to_stand_beside_it(monkeypatch):
    monkeypatch.setattr(
        "regrad_runner.diagnostics.explaining.create_all", lambda names: [Weights(), Later()]
    )
    monkeypatch.setattr(regrad, "available", lambda: {"both": None})
    assert relations(Weights()) == ({"both": "it contains 'weights'"}, {})


def test_a_plugin_that_cannot_be_loaded_says_nothing(monkeypatch):
    def broken(names):
        raise regrad.PluginLoadError(names[0])

    monkeypatch.setattr("regrad_runner.diagnostics.explaining.create_all", broken)
    assert relations(Weights()) == ({}, {})


@needs_plugins
def test_an_object_has_rows_only_in_the_stage_in_which_it_acts():
    (one,) = explained(corrections=("adanorm",)).corrections
    assert one.stages == ("moment",)
    assert {row["stage"] for row in one.rows} == {"moment"}
    (other,) = explained(corrections=("adanorm:target=gradient",)).corrections
    assert {row["stage"] for row in other.rows} == {"gradient"}


@needs_plugins
def test_the_head_that_agc_leaves_alone_is_shown_with_the_reason():
    explanation = explained(corrections=("agc", "centralization"))
    rows = {row["tensor"]: row for row in explanation.corrections[1].rows}
    assert rows["fc.weight"]["why"] == "'agc' leaves the classifier head alone: fc.weight"
    assert any(
        "'agc' acts after 'centralization'" in note for note in explanation.corrections[1].notes
    )


def test_without_corrections_there_is_only_the_plain_step():
    explanation = explained()
    assert explanation.corrections == []
    assert explanation.plain_step_seconds > 0
