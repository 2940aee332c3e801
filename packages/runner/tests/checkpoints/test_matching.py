import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from regrad.errors import RegradError
from regrad_runner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from regrad_runner.checkpoints.folder import checkpoints, checksum
from regrad_runner.checkpoints.matching import inventory
from regrad_runner.cli.main import main
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

FILES = ("receipt.json", "state.json", "tensors.pt")


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits", train_size=100)


def make(workload, *, seed=7, lr=0.05, **settings):
    values = {"batch_size": 25, "epochs": 2, "width": 4, "threads": 1, "optimizer": "adamw"}
    config = resolved(TrainConfig(**{**values, **settings}), workload)
    return TrainingRun(config, workload, Arm("baseline"), seed=seed, lr=lr)


@pytest.fixture
def saved(tmp_path, digits):
    """A checkpoint after three steps."""
    with closing(make(digits)) as run:
        for _ in islice(run.steps(), 3):
            pass
        return save_checkpoint(run, tmp_path)


def sign(path: Path) -> None:
    sums = {name: checksum(path / name) for name in FILES}
    (path / "checksums.json").write_text(json.dumps(sums))


def change(path: Path, edit) -> None:
    """Change the tensors of a checkpoint and what it says about them, as another program would write it."""
    tensors = torch.load(path / "tensors.pt", weights_only=True)
    edit(tensors)
    torch.save(tensors, path / "tensors.pt")
    state = json.loads((path / "state.json").read_text())
    state["inventory"] = inventory(tensors)
    (path / "state.json").write_text(json.dumps(state))
    sign(path)


def refused(run, path, message):
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with closing(run), pytest.raises(RegradError, match=message) as caught:
        load_checkpoint(run, path)
    assert "\n" not in str(caught.value)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.position.step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "got epochs 2 there and 3 here; change it back, or start again"),
        ({"batch_size": 20}, "got batch_size 25 there and 20 here"),
        ({"width": 8}, "got width 4 there and 8 here"),
        ({"clip_norm": 0.5}, "got clip_norm None there and 0.5 here"),
        ({"warmup_steps": 1}, "got warmup_steps 0 there and 1 here"),
        ({"optimizer": "adamw:weight_decay=0.5"}, "got optimizer 'adamw' there and 'adamw:weight_"),
        ({"seed": 8}, "got seed 7 there and 8 here"),
        ({"lr": 0.04}, "got lr 0.05 there and 0.04 here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(
    digits, saved, settings, message
):
    refused(make(digits, **settings), saved, message)


def test_a_checkpoint_of_other_data_is_refused_although_the_settings_are_the_same(digits, saved):
    more = load_workload("digits", train_size=101)
    refused(make(more), saved, "got training samples 100 there and 101 here")


def test_what_changes_no_number_may_differ(digits, saved):
    with closing(make(digits, threads=2, tracker="none", keep_checkpoints=5)) as run:
        assert load_checkpoint(run, saved) == []


def test_data_may_be_moved_and_that_is_said(digits, saved):
    with closing(make(digits, data_dir="/elsewhere")) as run:
        assert load_checkpoint(run, saved) == [
            "the data were in None when the checkpoint was written, and are in '/elsewhere' now"
        ]


def drop(part, name):
    return lambda tensors: tensors[part].pop(name)


def put(name, value):
    return lambda tensors: tensors["model"].update({name: value})


def spoil(value):
    def edit(tensors):
        tensors["model"]["fc.weight"][3, 5] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            drop("model", "fc.weight"),
            r"got nothing for 'model/fc.weight' instead of float32 \[10, 16",
        ),
        (drop("model", "norm.running_mean"), r"got nothing for 'model/norm.running_mean' instead"),
        (
            put("more.weight", torch.zeros(2)),
            r"got float32 \[2\] for 'model/more.weight' instead of no",
        ),
        (
            put("fc.bias", torch.zeros(11)),
            r"got float32 \[11\] for 'model/fc.bias' instead of float32",
        ),
        (
            put("fc.bias", torch.zeros(1)),
            r"got float32 \[1\] for 'model/fc.bias' instead of float32",
        ),
        (
            put("fc.bias", torch.zeros(10).double()),
            r"got float64 \[10\] for 'model/fc.bias' instead",
        ),
        (spoil(float("nan")), "must hold finite weights, got NaN or infinity in 'fc.weight'"),
        (spoil(float("-inf")), "must hold finite weights, got NaN or infinity in 'fc.weight'"),
    ],
)
def test_weights_that_are_missing_added_of_another_form_or_not_finite_are_refused(
    digits, saved, edit, message
):
    if "running_mean" in message:
        names = torch.load(saved / "tensors.pt", weights_only=True)["model"]
        name = next(name for name in names if name.endswith("running_mean"))
        edit, message = drop("model", name), f"got nothing for 'model/{name}' instead of float32"
    change(saved, edit)
    refused(make(digits), saved, message)


def test_running_statistics_that_are_not_finite_are_refused_unless_steps_were_skipped(
    digits, saved
):
    def edit(tensors):
        name = next(name for name in tensors["model"] if name.endswith("running_var"))
        tensors["model"][name][0] = float("nan")

    change(saved, edit)
    refused(make(digits), saved, "must hold finite weights, got NaN or infinity in '.*running_var'")
    state = json.loads((saved / "state.json").read_text())
    state["watch"]["skipped"] = 1
    (saved / "state.json").write_text(json.dumps(state))
    sign(saved)
    with closing(make(digits)) as run:
        load_checkpoint(run, saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_decay", 0.5, r"got weight_decay 0.5 there and 0.01 here in group 0"),
        ("betas", (0.5, 0.999), r"got betas \(0.5, 0.999\) there and \(0.9, 0.999\) here"),
        ("maximize", True, "got maximize True there and False here"),
        ("lr", 5.0, "learning rates of this run, got lr 5.0 there and 0.0"),
        ("initial_lr", 5.0, "learning rates of this run, got initial_lr 5.0 there and 0.05 here"),
        ("lr", float("nan"), "learning rates of this run, got lr nan there"),
    ],
)
def test_other_options_of_the_optimizer_are_refused(digits, saved, key, value, message):
    change(saved, lambda tensors: tensors["optimizer"]["groups"][0].update({key: value}))
    refused(make(digits), saved, message)


def test_an_optimizer_whose_state_is_not_a_number_is_refused(digits, saved):
    def edit(tensors):
        tensors["optimizer"]["state"]["fc.weight"]["exp_avg"][0, 0] = float("nan")

    change(saved, edit)
    refused(make(digits), saved, "numbers in the optimizer, got NaN in 'state/fc.weight/exp_avg'")


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.pop("fc.weight"),
        lambda state: state["fc.weight"].pop("exp_avg"),
        lambda state: state["fc.weight"].update(exp_avg=torch.zeros(10, 15)),
        lambda state: state["fc.weight"].update(exp_avg=torch.zeros(10, 16).half()),
        lambda state: state["fc.weight"].update(more=torch.zeros(3)),
    ],
)
def test_an_optimizer_whose_state_is_not_what_was_written_is_refused(digits, saved, edit):
    tensors = torch.load(saved / "tensors.pt", weights_only=True)
    edit(tensors["optimizer"]["state"])
    torch.save(tensors, saved / "tensors.pt")
    sign(saved)
    refused(
        make(digits), saved, r"must hold the tensors as it was written, got .* 'optimizer/state/"
    )


def test_a_checkpoint_that_does_not_say_its_settings_is_refused(digits, saved):
    state = json.loads((saved / "state.json").read_text())
    del state["identity"]
    (saved / "state.json").write_text(json.dumps(state))
    sign(saved)
    refused(make(digits), saved, "must hold its settings, got None; it is from an earlier")


SMALL = ["--train-size", "100", "--batch-size", "25", "--width", "4", "--epochs", "2"]
SMALL += ["--threads", "1", "--tracker", "none"]


@pytest.mark.parametrize(
    ("written", "edited", "said"),
    [
        ("epochs: 2", "epochs: 3", "got epochs 2 there and 3 here"),
        ("seed: 0", "seed: 1", "got seed 0 there and 1 here"),
        ("momentum=0.9", "momentum=0.5", "got optimizer 'sgd:momentum=0.9"),
        ("weight_decay=0.0", "weight_decay=0.1", "got optimizer 'sgd:momentum=0.9"),
        ("train_size: 100", "train_size: 99", "got train_size 100 there and 99 here"),
    ],
)
def test_settings_edited_in_the_folder_are_refused_and_the_folder_is_left_as_it_is(
    tmp_path, capsys, monkeypatch, written, edited, said
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "regrad_runner.training_command.ResultsFolder", None
        )  # it stops before it has ended
        with pytest.raises(TypeError):
            main(["train", *SMALL, "--out", str(out)])
    assert checkpoints(out / "checkpoints")
    settings = (out / "config.yaml").read_text()
    assert written in settings
    (out / "config.yaml").write_text(settings.replace(written, edited))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("regrad: checkpoint must have the settings of this run, ")
    assert said in line
    assert line.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
