"""A run of a comparison that was broken off goes on from its checkpoint as if nothing had been."""

import json

import pytest
import regrad
from regrad_runner.comparing.plan import make_plan, open_folder
from regrad_runner.comparing.running import Comparison
from regrad_runner.results.cells import Cell
from regrad_runner.results.run import read_record
from regrad_runner.settings.config import CompareConfig

CORRECTION = next(iter(name for name in ("xgrad", "agc") if name in regrad.available()), None)
pytestmark = pytest.mark.skipif(CORRECTION is None, reason="needs a correction to have effects")


class Silent:
    """A display that keeps what is said, and may press Ctrl-C after a step."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.said = []

    def say(self, text):
        self.said.append(text)

    def begin(self, name, *, steps):
        pass

    def step(self, step):
        if step == self.stop_after:
            raise KeyboardInterrupt


def made(path):
    config = CompareConfig(
        corrections=(CORRECTION,),
        train_size=100,
        batch_size=25,
        width=4,
        epochs=6,
        evaluations_per_epoch=2,
        probe_every=3,
        probe_size=50,
        lr=(0.05,),
        seeds=1,
        tracker="none",
    )
    plan = make_plan(config, out=path)
    open_folder(plan)
    return plan


def kept(run):
    """What a run's folder says, without what the clock says."""
    lines = [json.loads(line) for line in (run / "points.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
        line["values"] = {n: v for n, v in line["values"].items() if "second" not in n}
    result = read_record(run).result
    return lines, {name: value for name, value in result.items() if "second" not in name}


@pytest.mark.parametrize("trial", [False, True])
def test_a_run_goes_on_to_the_same_points_effects_probes_and_result(tmp_path, trial):
    cell = Cell(CORRECTION, 0, 0.05 if trial else None)
    whole = made(tmp_path / "whole")
    Comparison(whole, Silent()).run_cell(cell, lr=0.05)
    broken = made(tmp_path / "broken")
    run = broken.path.joinpath(*cell.folder_names)
    for stop_after in (7, 16):
        with pytest.raises(KeyboardInterrupt):
            Comparison(broken, Silent(stop_after), checkpoint_seconds=0.0).run_cell(cell, lr=0.05)
        assert read_record(run).status == "killed"
        assert list((run / "checkpoints").iterdir())
    display = Silent()
    Comparison(broken, display, checkpoint_seconds=0.0).run_cell(cell, lr=0.05)
    assert display.said == [f"{cell.name}: continuing from step 14"]
    assert kept(run) == kept(whole.path.joinpath(*cell.folder_names))
    assert not (run / "checkpoints").exists()
    kinds = {line["kind"] for line in kept(run)[0]}
    assert trial or kinds == {"evaluation", "effect", "probe", "metrics"}


def test_a_checkpoint_that_cannot_be_continued_from_is_said_and_the_run_starts_again(tmp_path):
    cell = Cell("baseline", 0)
    plan = made(tmp_path / "out")
    run = plan.path.joinpath(*cell.folder_names)
    with pytest.raises(KeyboardInterrupt):
        Comparison(plan, Silent(9), checkpoint_seconds=0.0).run_cell(cell, lr=0.05)
    (checkpoint,) = (run / "checkpoints").iterdir()
    (checkpoint / "tensors.pt").write_bytes(b"broken")
    display = Silent()
    Comparison(plan, display, checkpoint_seconds=0.0).run_cell(cell, lr=0.05)
    assert len(display.said) == 1
    assert display.said[0].startswith("baseline, seed 0 starts again: ")
    whole = made(tmp_path / "whole")
    Comparison(whole, Silent()).run_cell(cell, lr=0.05)
    assert kept(run) == kept(whole.path.joinpath(*cell.folder_names))


def test_without_a_time_for_checkpoints_there_are_none(tmp_path):
    plan = made(tmp_path / "out")
    cell = Cell("baseline", 0)
    with pytest.raises(KeyboardInterrupt):
        Comparison(plan, Silent(9)).run_cell(cell, lr=0.05)
    assert not (plan.path.joinpath(*cell.folder_names) / "checkpoints").exists()
