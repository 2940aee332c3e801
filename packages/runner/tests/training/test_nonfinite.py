import csv
import json
import math
from contextlib import closing

import pytest
import regrad
import torch
from accelerate import Accelerator
from regrad.errors import RegradWarning
from regrad_runner.checkpoints.folder import checkpoints, read_checkpoint
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import nonfinite
from regrad_runner.training.nonfinite import SKIPS_IN_A_ROW, STEPS_KEPT, NonFiniteError, Watch
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

SHAPE = [
    "--train-size",
    "100",
    "--batch-size",
    "25",
    "--width",
    "4",
    "--norm",
    "group",
    "--tracker",
    "none",
]


@pytest.fixture
def layers():
    """Two tensors: of norm 5 and 2 in their gradients, and one that has none."""
    weight, bias, unused = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 3))
    weight.grad, bias.grad = torch.tensor([3.0, 4.0]), torch.tensor([-2.0])
    return {"weight": weight, "bias": bias, "unused": unused}


@pytest.fixture
def watch(layers):
    return Watch(layers.items(), Accelerator())


def rows(table):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(table.splitlines())]


def test_a_finite_step_may_be_taken_and_its_norms_are_kept(watch):
    assert watch.is_finite(7, torch.tensor(0.5))
    assert rows(watch.table()) == [{"step": 7, "loss": 0.5, "weight": 5, "bias": 2, "unused": 0}]
    assert watch.skipped == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_step_that_is_not_finite_may_not_be_taken_and_is_counted(watch, layers, where, value):
    loss = torch.tensor(value if where == "loss" else 1.0)
    if where == "weight":
        layers["weight"].grad[0] = value
    with pytest.warns(
        RegradWarning,
        match="loss or gradients of step 1 are not finite; the step is skipped, and 10 in a row",
    ):
        assert not watch.is_finite(1, loss)
    assert not watch.is_finite(2, loss)
    assert watch.skipped == 2
    assert not math.isfinite(rows(watch.table())[0][where])


def test_the_ring_holds_the_last_steps_oldest_first(watch):
    for step in range(1, STEPS_KEPT + 8):
        watch.is_finite(step, torch.tensor(float(step)))
    kept = rows(watch.table())
    assert [row["step"] for row in kept] == list(range(8, STEPS_KEPT + 8))
    assert [row["loss"] for row in kept] == [row["step"] for row in kept]


@pytest.mark.filterwarnings("ignore:loss or gradients of step:regrad.errors.RegradWarning")
def test_only_so_many_in_a_row_end_the_run(watch):
    bad, good = torch.tensor(math.nan), torch.tensor(1.0)
    for step in range(3 * SKIPS_IN_A_ROW):
        assert watch.is_finite(step, good if step % SKIPS_IN_A_ROW == 0 else bad) == (
            step % SKIPS_IN_A_ROW == 0
        )
    assert watch.is_finite(30, good)
    for step in range(31, 30 + SKIPS_IN_A_ROW):
        assert not watch.is_finite(step, bad)
    message = "not finite in 10 steps in a row, the last is step 40; lower lr, clip the gradients, or look at nonfinite"
    with pytest.raises(NonFiniteError, match=message) as problem:
        watch.is_finite(40, bad)
    assert [row["step"] for row in rows(problem.value.table)] == list(range(41))
    assert watch.skipped == 3 * (SKIPS_IN_A_ROW - 1) + SKIPS_IN_A_ROW


def spoil(monkeypatch, steps):
    """Make the gradients of some steps infinite, after backward."""
    original = Watch.is_finite

    def spoiled(self, step, loss):
        if step in steps:
            self._parameters[0].grad.fill_(math.inf)
        return original(self, step, loss)

    monkeypatch.setattr(Watch, "is_finite", spoiled)


@pytest.mark.parametrize("corrections", [(), ("xgrad",)])
def test_a_skipped_step_changes_no_weight_no_state_and_no_rate(monkeypatch, corrections):
    if not set(corrections) <= regrad.available().keys():
        pytest.skip("regrad-xgrad is not installed")
    spoil(monkeypatch, {3})
    workload = load_workload("digits", train_size=100)
    config = resolved(
        TrainConfig(batch_size=25, epochs=1, width=4, norm="group", threads=1), workload
    )
    seen = []
    arm = Arm("arm", corrections)
    with closing(TrainingRun(config, workload, arm, seed=0, lr=0.05)) as run:
        model, optimizer = run.accelerator.unwrap_model(run.model), run.optimizer.optimizer
        with pytest.warns(RegradWarning, match="step 3 are not finite"):
            for _ in run.steps():
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
                seen.append((weights, momenta, run.scheduler.get_last_lr()))
        receipt, metrics = run.receipt(), run.metrics()
    second, third, fourth = seen[1:]
    assert all(torch.equal(second[0][name], third[0][name]) for name in second[0])
    assert all(map(torch.equal, second[1], third[1]))
    assert second[2] == third[2]
    assert not all(torch.equal(fourth[0][name], third[0][name]) for name in second[0])
    assert all(tensor.isfinite().all() for tensor in fourth[0].values())
    assert (receipt["run"]["steps_not_finite"], metrics["steps_not_finite"]) == (1, 1.0)
    assert receipt["steps_applied"] == 3


@pytest.mark.filterwarnings("ignore:loss or gradients of step:regrad.errors.RegradWarning")
def test_a_run_that_stays_infinite_ends_as_failed_with_its_last_norms_in_a_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spoil(monkeypatch, range(4, 99))
    assert main(["train", *SHAPE, "--epochs", "9", "--checkpoint-every", "2", "--out", "out"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "regrad: loss or gradients were not finite in 10 steps in a row, the last is step 13; lower"
    )
    (table,) = (tmp_path / "out" / "runs").rglob("nonfinite.csv")
    kept = rows(table.read_text())
    assert [row["step"] for row in kept] == list(range(1, 14))
    assert math.isinf(list(kept[-1].values())[2])
    assert all(math.isfinite(value) for value in kept[2].values())


@pytest.mark.filterwarnings("ignore:loss or gradients of step:regrad.errors.RegradWarning")
def test_a_resumed_run_knows_the_steps_that_were_skipped_and_how_many_in_a_row(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spoil(monkeypatch, {2, *range(6, 99)})
    words = ["train", *SHAPE, "--checkpoint-every", "1", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(nonfinite, "SKIPS_IN_A_ROW", 3)
        assert (
            main([*words, "--epochs", "9"]) == 1
        )  # at step 8: steps 6 and 7 are in the checkpoint
    assert main(["train", "--resume", "--out", "out"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "in 10 steps in a row, the last is step 15" in last
    state = read_checkpoint(checkpoints(tmp_path / "out" / "checkpoints")[-1]).state
    assert (state["step"], state["watch"]) == (14, {"skipped": 10, "in_a_row": 9})


@pytest.mark.filterwarnings("ignore:loss or gradients of step:regrad.errors.RegradWarning")
def test_in_a_comparison_such_a_run_has_diverged_and_its_norms_stand_beside_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nonfinite, "SKIPS_IN_A_ROW", 2)
    (tmp_path / "baseline.yaml").write_text("corrections: []\n")
    runs, original = [], TrainingRun.train

    def train(self, **hooks):
        runs.append(self)
        if len(runs) == 1:
            self._dtype = torch.float32
            next(self.model.parameters()).data.fill_(math.nan)
        original(self, **hooks)

    monkeypatch.setattr(TrainingRun, "train", train)
    assert (
        main(
            [
                "compare",
                *SHAPE,
                "--epochs",
                "1",
                "--seeds",
                "2",
                "--config",
                "baseline.yaml",
                "--out",
                "out",
            ]
        )
        == 0
    )
    assert "not finite in 2 steps in a row" in capsys.readouterr().err
    assert [r.status for r in ResultsFolder(tmp_path / "out").results] == ["diverged", "finished"]
    assert main(["compare", "--resume", "--out", "out"]) == 0
    assert len(runs) == 2  # it would diverge again
    (path,) = (tmp_path / "out").rglob("nonfinite.csv")
    assert path.parent == tmp_path / "out" / "runs" / "baseline" / "0"
    receipt = json.loads(
        (tmp_path / "out" / "runs" / "baseline" / "1" / "receipt.json").read_text()
    )
    assert receipt["run"]["steps_not_finite"] == 0
