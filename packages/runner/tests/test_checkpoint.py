import json
import random
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import regrad
import torch
from regrad.correction import Correction, Needs
from regrad.errors import RegradError
from regrad_runner import training
from regrad_runner.arms import Arm
from regrad_runner.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from regrad_runner.config import TrainConfig
from regrad_runner.training import TrainingRun
from regrad_runner.workloads import load_workload

needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad"} <= regrad.available().keys(),
    reason="regrad-xgrad and regrad-powergrad are not installed",
)


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits", train_size=200)


@pytest.fixture
def config(digits):
    def make(**values):
        small = {"batch_size": 24, "epochs": 3, "width": 4, "threads": 1, "evaluations_per_epoch": 2, "warmup_steps": 4}
        return TrainConfig(**{**small, **values}).resolved(digits)

    return make


def weights_of(run):
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def finish(run):
    run.train(on_point=lambda point: None, on_step=lambda step: None)
    return run.position.points, weights_of(run)


def stop_after(run, steps):
    """Train that many steps, evaluating as `train` does, and leave the loop in the middle of an epoch."""
    for step in run.steps():
        if step % run.evaluate_every == 0:
            run.evaluate()
        if step == steps:
            return


def resumed(config, workload, arm, folder, *, steps):
    """Stop after some steps, save, and go on in a run of its own; return its points and weights."""
    with closing(TrainingRun(config, workload, arm, seed=7, lr=0.05)) as first:
        stop_after(first, steps)
        path = save_checkpoint(first, folder)
    torch.manual_seed(999)  # whatever happens between the two
    with closing(TrainingRun(config, workload, arm, seed=7, lr=0.05)) as second:
        load_checkpoint(second, path)
        assert second.position.step == steps
        return finish(second)


class Noisy(Correction):
    """Draws from the global random state at every step: a resumed run must draw the same numbers."""

    name = "noisy"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        for gradient in step.gradients:
            gradient.add_(torch.randn_like(gradient), alpha=1e-2)


@pytest.mark.parametrize("steps", [1, 8, 13])  # in the first epoch, at an epoch's end, between two evaluations
@pytest.mark.parametrize(
    ("corrections", "settings"),
    [
        ((), {}),
        ((), {"accumulate": 2}),
        ((), {"optimizer": "adamw", "clip_norm": 0.5}),
        pytest.param(("xgrad",), {}, marks=needs_plugins),
        pytest.param(("xgrad",), {"optimizer": "radam"}, marks=needs_plugins),
        pytest.param(("powergrad",), {}, marks=needs_plugins),
        pytest.param(("xgrad", "powergrad"), {"accumulate": 3}, marks=needs_plugins),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, digits, config, corrections, settings, steps):
    arm = Arm("+".join(corrections) or "none", corrections)
    with closing(TrainingRun(config(**settings), digits, arm, seed=7, lr=0.05)) as run:
        points, weights = finish(run)
    resumed_points, resumed_weights = resumed(config(**settings), digits, arm, tmp_path, steps=steps)
    assert resumed_points == points
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_resumed_run_draws_the_random_numbers_that_would_have_come(monkeypatch, tmp_path, digits, config):
    monkeypatch.setattr(training, "create_all", lambda arm: [Noisy()])
    with closing(TrainingRun(config(), digits, Arm("noisy"), seed=7, lr=0.05)) as run:
        _, weights = finish(run)
    _, resumed_weights = resumed(config(), digits, Arm("noisy"), tmp_path, steps=11)
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_checkpoint_in_the_middle_of_an_accumulation_is_refused(tmp_path, digits, config):
    with closing(TrainingRun(config(accumulate=3), digits, Arm("none"), seed=0, lr=0.05)) as run:
        next(run.steps())
        run.position.batch += 1
        with pytest.raises(RegradError, match="must be saved after an optimizer step, got micro-batch 1 of 3"):
            save_checkpoint(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_checkpoints_are_kept(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("none"), seed=0, lr=0.05)) as run:
        for step in run.steps():
            save_checkpoint(run, tmp_path)
            if step == 4:
                break
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_what_a_kill_left_behind_is_no_checkpoint(tmp_path, digits, config):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / ".step-00000001.part").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with closing(TrainingRun(config(), digits, Arm("none"), seed=0, lr=0.05)) as run:
        next(run.steps())
        assert save_checkpoint(run, tmp_path) == latest_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_is_tensors_that_load_safely_and_json(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("none"), seed=0, lr=0.05)) as run:
        stop_after(run, 5)
        path = save_checkpoint(run, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.pt"]
    tensors = torch.load(path / "tensors.pt", weights_only=True)
    assert tensors["optimizer"]["state"]["fc.weight"]["momentum_buffer"].shape == (10, 16)
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["epoch"], state["batch"], len(state["points"])) == (5, 0, 5, 1)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("none"), seed=0, lr=0.05)) as run:
        next(run.steps())
        path = save_checkpoint(run, tmp_path)
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "format": 99}))
        with pytest.raises(RegradError, match="checkpoint must be of format 1, got 99"):
            load_checkpoint(run, path)


@needs_plugins
def test_a_checkpoint_of_other_corrections_is_refused(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("xgrad", ("xgrad",)), seed=0, lr=0.05)) as run:
        next(run.steps())
        path = save_checkpoint(run, tmp_path)
    with (
        closing(TrainingRun(config(), digits, Arm("x", ("xgrad:horizon=2",)), seed=0, lr=0.05)) as run,
        pytest.raises(RegradError, match="horizon"),
    ):
        load_checkpoint(run, path)


def two_layers(*, swapped=False):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers = [list(layer.parameters()) for layer in model]
    groups = [{"params": layers[0], "lr": 0.1}, {"params": layers[1], "lr": 0.2}]
    return model, torch.optim.SGD(groups[::-1] if swapped else groups, momentum=0.9)


def test_optimizer_state_goes_by_name_whatever_the_order_of_the_groups():
    model, optimizer = two_layers()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer_state(model, optimizer)
    other_model, other = two_layers(swapped=True)
    load_optimizer(other_model, other, saved)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    for name, parameter in other_model.named_parameters():
        momentum = other.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, optimizer.state[dict(model.named_parameters())[name]]["momentum_buffer"])


def test_an_optimizer_of_other_groups_is_refused():
    model, optimizer = two_layers()
    one_group = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        RegradError, match="optimizer must have the checkpoint's parameter groups, got others in group 0"
    ):
        load_optimizer(model, one_group, optimizer_state(model, optimizer))


def test_random_states_come_back():
    state = random_state()

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002

    first = draws()
    set_random_state(state)
    assert draws() == first


def test_points_survive_json(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("none"), seed=0, lr=0.05)) as run:
        stop_after(run, 4)
        run.position.points[0] = replace(run.position.points[0], loss=0.1 + 0.2)
        path = save_checkpoint(run, tmp_path)
        points = list(run.position.points)
        load_checkpoint(run, path)
        assert run.position.points == points
