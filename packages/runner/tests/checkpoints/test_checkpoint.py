import json
from contextlib import closing
from dataclasses import replace

import pytest
import regrad
import torch
from regrad.correction import Correction, Needs
from regrad.errors import RegradError
from regrad_runner.checkpoints.checkpoint import load_checkpoint, load_latest, save_checkpoint
from regrad_runner.checkpoints.folder import checkpoints
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import building
from regrad_runner.training import run as training
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload
from regrad_testing import load_beside, run_on_processes

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
        small = {
            "batch_size": 24,
            "epochs": 3,
            "width": 4,
            "threads": 1,
            "evaluations_per_epoch": 2,
            "warmup_steps": 4,
        }
        return resolved(TrainConfig(**{**small, **values}), digits)

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


@pytest.mark.parametrize(
    "steps", [1, 8, 13]
)  # in the first epoch, at an epoch's end, between two evaluations
@pytest.mark.parametrize(
    ("corrections", "settings"),
    [
        ((), {}),
        ((), {"accumulate": 2}),
        ((), {"optimizer": "adamw", "clip_norm": 0.5}),
        ((), {"optimizer": "sgd:momentum=0"}),  # an optimizer without state
        pytest.param(("xgrad",), {}, marks=needs_plugins),
        pytest.param(("xgrad",), {"optimizer": "radam"}, marks=needs_plugins),
        pytest.param(("powergrad",), {}, marks=needs_plugins),
        pytest.param(("xgrad", "powergrad"), {"accumulate": 3}, marks=needs_plugins),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, digits, config, corrections, settings, steps
):
    arm = Arm("+".join(corrections) or "baseline", corrections)
    with closing(TrainingRun(config(**settings), digits, arm, seed=7, lr=0.05)) as run:
        points, weights = finish(run)
    resumed_points, resumed_weights = resumed(
        config(**settings), digits, arm, tmp_path, steps=steps
    )
    assert resumed_points == points
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


REFUSES_ADAMW = {"adafisher": "sgd:momentum=0.9"}
# Each rank draws rows of its own, so that runs on other numbers of processes agree in the mean.
DRAW = {"uniform-rows", "wta-crs"}


@pytest.mark.parametrize("name", regrad.available())
def test_a_run_resumes_exactly_with_every_correction_that_is_installed(
    tmp_path, digits, config, name
):
    arm = Arm(name, (name,))
    optimizer = REFUSES_ADAMW.get(name, "adamw")  # on two processes below: SGD with momentum
    with closing(TrainingRun(config(optimizer=optimizer), digits, arm, seed=7, lr=0.01)) as run:
        points, weights = finish(run)
        metrics = run.attachment.metrics()
    with closing(TrainingRun(config(optimizer=optimizer), digits, arm, seed=7, lr=0.01)) as first:
        stop_after(first, 13)
        path = save_checkpoint(first, tmp_path)
    with closing(TrainingRun(config(optimizer=optimizer), digits, arm, seed=7, lr=0.01)) as second:
        assert load_checkpoint(second, path) == []
        assert finish(second)[0] == points
        assert second.attachment.metrics() == metrics
        assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(second).items())


def test_a_resumed_run_draws_the_random_numbers_that_would_have_come(
    monkeypatch, tmp_path, digits, config
):
    monkeypatch.setattr(training, "create_all", lambda arm: [Noisy()])
    with closing(TrainingRun(config(), digits, Arm("noisy"), seed=7, lr=0.05)) as run:
        _, weights = finish(run)
    _, resumed_weights = resumed(config(), digits, Arm("noisy"), tmp_path, steps=11)
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_the_loss_scale_comes_back(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        next(run.steps())
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        path = save_checkpoint(run, tmp_path)
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        load_checkpoint(run, path)
        assert run.accelerator.scaler.get_scale() == 8.0


def test_a_checkpoint_in_the_middle_of_an_accumulation_is_refused(tmp_path, digits, config):
    with closing(
        TrainingRun(config(accumulate=3), digits, Arm("baseline"), seed=0, lr=0.05)
    ) as run:
        next(run.steps())
        run.position.batch += 1
        with pytest.raises(
            RegradError, match="must be saved after an optimizer step, got micro-batch 1 of 3"
        ):
            save_checkpoint(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "kept"), [({}, [3, 4]), ({"keep": 1}, [4]), ({"keep": 3}, [2, 3, 4])]
)
def test_the_last_checkpoints_are_kept_two_unless_told(tmp_path, digits, config, options, kept):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        for step in run.steps():
            save_checkpoint(run, tmp_path, **options)
            if step == 4:
                break
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in kept]


def test_what_a_kill_left_behind_is_no_checkpoint(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        assert load_latest(run, tmp_path / "baseline") == (None, [])
        (tmp_path / ".step-00000001.part").mkdir()
        (tmp_path / ".step-00000000.old").mkdir()
        assert load_latest(run, tmp_path) == (None, [])
        next(run.steps())
        assert [save_checkpoint(run, tmp_path)] == checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_damaged_checkpoint_is_passed_over_and_the_run_still_ends_in_the_same_weights(
    tmp_path, digits, config
):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=7, lr=0.05)) as run:
        run.train(
            on_point=lambda point: None,
            on_step=lambda step: save_checkpoint(run, tmp_path) if step in (9, 13) else None,
        )
        weights = weights_of(run)
    with (tmp_path / "step-00000013" / "tensors.pt").open("r+b") as file:
        file.truncate(1000)
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=7, lr=0.05)) as run:
        path, lines = load_latest(run, tmp_path)
        assert (path.name, run.position.step) == ("step-00000009", 9)
        assert lines == [
            "checkpoint step-00000013 is damaged: tensors.pt has changed since it was written; "
            f"it is now '{tmp_path / 'damaged-step-00000013'}', and step-00000009 is used instead"
        ]
        assert all(torch.equal(weights[name], tensor) for name, tensor in finish(run)[1].items())


def test_a_checkpoint_is_tensors_that_load_safely_and_json(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        stop_after(run, 5)
        path = save_checkpoint(run, tmp_path)
    files = ["checksums.json", "receipt.json", "state.json", "tensors.pt"]
    assert sorted(file.name for file in path.iterdir()) == files
    assert json.loads((path / "receipt.json").read_text())["run"]["arm"] == "baseline"
    tensors = torch.load(path / "tensors.pt", weights_only=True)
    assert tensors["optimizer"]["state"]["fc.weight"]["momentum_buffer"].shape == (10, 16)
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["epoch"], state["batch"], len(state["points"])) == (5, 0, 5, 1)


@needs_plugins
def test_a_checkpoint_of_other_corrections_is_refused(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("xgrad", ("xgrad",)), seed=0, lr=0.05)) as run:
        next(run.steps())
        path = save_checkpoint(run, tmp_path)
    with (
        closing(
            TrainingRun(config(), digits, Arm("x", ("xgrad:horizon=2",)), seed=0, lr=0.05)
        ) as run,
        pytest.raises(
            RegradError, match=r"must come from the same corrections; xgrad\.horizon was 1\.0, is 2"
        ),
    ):
        load_checkpoint(run, path)
    with (
        closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run,
        pytest.raises(RegradError, match="'xgrad' is missing here"),
    ):
        load_checkpoint(run, path)


@needs_plugins
def test_a_checkpoint_of_corrections_in_another_order_is_refused(tmp_path, digits, config):
    with closing(
        TrainingRun(config(), digits, Arm("a", ("xgrad", "powergrad")), seed=0, lr=0.05)
    ) as run:
        next(run.steps())
        path = save_checkpoint(run, tmp_path)
    with (
        closing(
            TrainingRun(config(), digits, Arm("b", ("powergrad", "xgrad")), seed=0, lr=0.05)
        ) as run,
        pytest.raises(
            RegradError, match=r"the checkpoint's order \(xgrad, powergrad\), got powergrad, xgrad"
        ),
    ):
        load_checkpoint(run, path)


def test_points_survive_json(tmp_path, digits, config):
    with closing(TrainingRun(config(), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        stop_after(run, 4)
        run.position.points[0] = replace(run.position.points[0], loss=0.1 + 0.2)
        path = save_checkpoint(run, tmp_path)
        points = list(run.position.points)
        load_checkpoint(run, path)
        assert run.position.points == points


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes_resume_exactly_with_every_correction_and_go_to_one_process_and_back(
    tmp_path, monkeypatch
):
    resuming = load_beside(__file__, "resuming")
    monkeypatch.setattr(building, "make_model", resuming.in_float64)
    names = ["", *regrad.available()]
    whole = {}
    for name in names:
        with closing(resuming.make(name)) as run:
            whole[name] = resuming.trained(run, save=tmp_path / (name or "baseline") / "one")[1]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_on_processes(resuming.outcomes, tmp_path, names, patience=600)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [name for name in names if not results[name]["exact"]] == []
    for name in names:
        from_two, lines = resuming.continued(name, tmp_path / (name or "baseline") / "two")[1:]
        assert lines[0].startswith(
            "the checkpoint was written by 2 processes and continues on 1: images keep their order"
        )
        assert results[name]["lines"][0].startswith(
            "the checkpoint was written by 1 processes and continues on 2"
        )
        if name in DRAW:
            continue
        for seen in (from_two, results[name]["from_one"]):
            pairs = whole[name].items()
            differences = [(seen[key] - tensor).abs().max().item() for key, tensor in pairs]
            # float64: sums in another order, repeated over the steps
            assert max(differences) <= 1e-10, name
