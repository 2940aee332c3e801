from contextlib import closing

import pytest
import torch
from regrad_runner.diagnostics.exits import (
    AS_PREDICTED,
    BY_SUMS,
    Answers,
    ExitOutcome,
    budgeted,
    exit_measures,
    exit_outcomes,
    exit_taken,
    keep_exits,
    kept_exits,
    running_sums,
    shares,
    thresholds,
)
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.run import begin_run
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import CompareConfig
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

SMALL = {"epochs": 1, "train_size": 100, "batch_size": 50, "width": 4, "seeds": 1}
SEVERAL = {**SMALL, "model": "multiexit8", "tracker": "none"}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_shares_grow_by_the_ratio_and_add_up():
    assert shares(1.0, 3) == pytest.approx([1 / 3] * 3)
    assert shares(0.5, 3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_on_the_samples_that_chose_them_thresholds_give_the_shares(ratio, generator):
    confidences = torch.rand(3, 700, generator=generator, dtype=torch.float64)
    wanted = shares(ratio, 3)
    taken = exit_taken(confidences, thresholds(confidences, wanted))
    left = torch.bincount(taken, minlength=3) / 700
    assert left.tolist() == pytest.approx(wanted, abs=2 / 700)


def test_those_leave_first_who_are_surest():
    confidences = torch.tensor([[0.2, 0.9, 0.5, 0.7], [0.9, 0.1, 0.8, 0.1], [0.5] * 4])
    bounds = thresholds(confidences, [0.25, 0.5, 0.25])
    # The second leaves first; of the three that stay the first and the third are surest.
    assert bounds == [pytest.approx(0.9), pytest.approx(0.8), -torch.inf]
    assert exit_taken(confidences, bounds).tolist() == [1, 0, 1, 2]


def test_equal_confidences_leave_together():
    confidences = torch.tensor([[0.5, 0.5, 0.5, 0.4], [0.9, 0.9, 0.9, 0.9]])
    assert exit_taken(confidences, thresholds(confidences, [0.25, 0.75])).tolist() == [0, 0, 0, 1]


def test_nobody_leaves_where_nobody_is_to_leave():
    confidences = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    assert thresholds(confidences, [0.1, 0.9]) == [torch.inf, -torch.inf]
    assert exit_taken(confidences, [torch.inf, -torch.inf]).tolist() == [1, 1]


def test_a_budget_worked_out_by_hand():
    # Two exits that cost 1 and 3; half of the validation samples leave at the first.
    validation = Answers(torch.tensor([[0.9, 0.6], [0.5, 0.5]]), torch.ones(2, 2).bool())
    test = Answers(
        torch.tensor([[0.95, 0.91, 0.9, 0.1], [0.5] * 4]),
        torch.tensor([[True, False, True, True], [True, True, True, False]]),
    )
    # Three leave at the first, of whom two are right; the last goes on and is wrong.
    assert budgeted(validation, test, [1, 3], ratio=1.0) == (0.5, 1.5)


def test_answers_are_those_of_the_largest_logit():
    logits = [torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 9.0]])]
    answers = Answers.of(logits, torch.tensor([1, 0]))
    assert answers.accuracies == [0.5, 0.5]
    assert answers.confidences[0].tolist() == pytest.approx([0.5, 1 / (1 + 2.718281828459045**-3)])


def made(*corrections, **settings):
    config = CompareConfig(**{**SEVERAL, **settings}, corrections=())
    workload = load_workload("digits", train_size=100)
    arm = Arm("+".join(corrections) or "baseline", corrections=corrections)
    return closing(TrainingRun(resolved(config, workload), workload, arm, seed=0, lr=0.05))


def test_a_run_with_exits_says_what_each_is_worth():
    with made() as run:
        for _ in run.steps():
            pass
        measures = exit_measures(exit_outcomes(run))
        value = run.value_on(run.workload.test)
        assert run.model.training
        outputs = run.model.eval()(run.workload.test.__getitems__(list(range(360)))[0])
    assert measures["exit 3 test accuracy"] == pytest.approx(value)
    labels = run.workload.test.labels
    for number, output in enumerate(running_sums(outputs), start=1):
        is_right = output.argmax(1) == labels
        assert measures[f"exit {number} test accuracy of sums"] == pytest.approx(
            is_right.double().mean().item()
        )
    costs = [measures[f"exit {number} multiply-adds"] for number in (1, 2, 3)]
    assert costs == [20776.0, 34680.0, 48664.0]
    spent = [measures[f"budget {ratio} multiply-adds"] for ratio in ("0.25", "1", "4")]
    assert costs[0] < spent[0] < spent[1] < spent[2] < costs[2]


def test_a_run_without_exits_says_nothing_of_them():
    with made(model="resnet8") as run:
        assert exit_outcomes(run) == []


def test_the_measure_is_that_of_what_the_last_exit_predicts(monkeypatch):
    with made() as run:
        plain = run.value_on(run.workload.test)
        criterion = run.attachment.criterion
        # A criterion whose last exit predicts the opposite of its logits.
        monkeypatch.setattr(
            type(criterion),
            "predictions",
            lambda self, outputs: [-output for output in outputs],
            raising=False,
        )
        assert run.value_on(run.workload.test) != plain


def outcome(answer, judged, accuracy, multiply_adds):
    return ExitOutcome(
        arm="boosted",
        seed=3,
        step=20,
        answer=answer,
        judged=judged,
        accuracy=accuracy,
        multiply_adds=multiply_adds,
    )


OUTCOMES = [
    outcome("exit 1", AS_PREDICTED, 0.5, 20.0),
    outcome("budget 0.25", AS_PREDICTED, 0.625, 25.0),
    outcome("exit 1", BY_SUMS, 0.25, 20.0),
    outcome("budget 0.25", BY_SUMS, 0.375, 26.0),
]


def test_what_exits_are_worth_has_names_as_metrics():
    assert exit_measures(OUTCOMES) == {
        "exit 1 test accuracy": 0.5,
        "exit 1 multiply-adds": 20.0,
        "budget 0.25 test accuracy": 0.625,
        "budget 0.25 multiply-adds": 25.0,
        "exit 1 test accuracy of sums": 0.25,
        "budget 0.25 test accuracy of sums": 0.375,
        "budget 0.25 multiply-adds of sums": 26.0,
    }


def test_what_exits_are_worth_is_read_back_from_the_folder_of_the_run(tmp_path):
    result = Result(arm="boosted", seed=3, lr=0.1, value=0.5, step_seconds=0.01, steps=20)
    with begin_run(tmp_path, {"name": "a run", "arm": "boosted", "seed": 3, "lr": 0.1}) as record:
        keep_exits(record, OUTCOMES)
        record.end("finished", result=numbers_of(result))
    assert kept_exits(ResultsFolder(tmp_path)) == OUTCOMES
