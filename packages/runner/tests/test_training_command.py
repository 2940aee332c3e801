import io
import json
from dataclasses import replace

import pytest
import torch
from regrad_runner import training_command as module
from regrad_runner.checkpoints.folder import checkpoints, read_checkpoint
from regrad_runner.reporting.progress import Display
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training_command import make_training_plan, train
from rich.console import Console

SMALL = {
    "epochs": 3,
    "train_size": 100,
    "batch_size": 25,
    "width": 4,
    "tracker": "none",
    "checkpoint_every": 5,
}


def run(folder, *, resume=False, **values):
    text = io.StringIO()
    plan = make_training_plan(TrainConfig(**{**SMALL, **values}), out=folder, resume=resume)
    with Display(Console(file=text, width=200), runs=1) as display:
        result = train(plan, display)
    return result, text.getvalue()


def weights(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1]).tensors["model"]


def without_times(result):
    return replace(result, seconds=0.0, step_seconds=0.0)


def test_a_run_leaves_result_curve_receipt_and_checkpoints(tmp_path):
    result, text = run(tmp_path / "out")
    folder = ResultsFolder(tmp_path / "out")
    assert folder.results == [result]
    assert [point.step for point in folder.curves] == list(range(1, 13))
    receipt = tmp_path / "out" / "runs" / "baseline" / "0" / "receipt.json"
    assert json.loads(receipt.read_text())["steps_applied"] == 12
    assert sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000012",
    ]
    assert "step 12/12: loss" in text


def test_without_a_number_a_checkpoint_is_written_after_each_epoch(tmp_path):
    run(tmp_path / "out", checkpoint_every=None)
    assert sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]


def test_as_many_checkpoints_stay_as_asked(tmp_path):
    run(tmp_path / "out", checkpoint_every=2, keep_checkpoints=4)
    assert [p.name[-2:] for p in checkpoints(tmp_path / "out" / "checkpoints")] == [
        "06",
        "08",
        "10",
        "12",
    ]


def test_a_damaged_checkpoint_is_told_of(tmp_path):
    run(tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "step-00000012" / "state.json").unlink()
    _, text = run(tmp_path / "out", resume=True)
    assert "checkpoint step-00000012 is damaged: state.json is missing" in text
    assert "continuing from step 10" in text


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    original = module.save_checkpoint

    def stopping(run, folder, **options):
        original(run, folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert ResultsFolder(tmp_path / "out").results == []
    resumed, text = run(tmp_path / "out", resume=True)
    assert "continuing from step 5" in text
    assert without_times(resumed) == without_times(whole)
    assert ResultsFolder(tmp_path / "out").curves == ResultsFolder(tmp_path / "whole").curves
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_that_is_resumed_trains_no_more(tmp_path):
    first, _ = run(tmp_path / "out")
    again, text = run(tmp_path / "out", resume=True)
    assert without_times(again) == without_times(first)
    assert "continuing from step 12" in text
    assert len(ResultsFolder(tmp_path / "out").curves) == 12


def test_another_configuration_is_refused(tmp_path):
    run(tmp_path / "out", epochs=1)
    with pytest.raises(
        ValueError, match="out must hold the same configuration, got epochs 1 there and 2 here"
    ):
        make_training_plan(TrainConfig(**{**SMALL, "epochs": 2}), out=tmp_path / "out", resume=True)


def test_an_unknown_correction_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="no correction named 'no-such'"):
        make_training_plan(TrainConfig(**SMALL, corrections=("no-such",)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
