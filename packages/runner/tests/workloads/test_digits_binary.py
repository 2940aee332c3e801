from contextlib import closing
from itertools import islice

import pytest
import regrad
import torch
from regrad.correction import Control
from regrad_runner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.building import build_training
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

SMALL = {"batch_size": 50, "epochs": 4, "width": 4, "threads": 1}
needs_bop = pytest.mark.skipif(
    "bop" not in regrad.available("regrad.optimizers"), reason="regrad-bop is not installed"
)


@pytest.fixture(scope="module")
def workload():
    return load_workload("digits-binary", train_size=100)


@pytest.fixture(scope="module")
def in_two_steps():
    return load_workload("digits-binary:two_steps=true", train_size=100)


def begun(workload, arm=None, **values):
    """Return a run of eight steps, before the first one."""
    config = resolved(TrainConfig(workload=workload.name, **{**SMALL, **values}), workload)
    return TrainingRun(config, workload, arm or Arm("baseline"), seed=0, lr=float(config.lr))


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def binary_of(run):
    return [weight.detach().clone() for weight in run.workload.binary_parameters(run.model)]


def test_it_has_the_digits_and_trains_latent_weights_with_adam(workload):
    digits = load_workload("digits", train_size=100)
    parts = (w.validation.__getitems__([0, 1, 2]) for w in (workload, digits))
    for one, other in zip(*parts, strict=True):
        assert torch.equal(one, other)
    with closing(begun(workload)) as run:
        assert run.config.optimizer.startswith("adam")
        assert run.lr == 1e-2
        assert [group.get("binary") for group in run.optimizer.param_groups] == [True, None]
        before = binary_of(run)
        assert len(list(run.steps())) == 8
        assert all((a != b).any() for a, b in zip(binary_of(run), before, strict=True))
        metrics = run.metrics()
    assert 0 < metrics["signs/flips_per_step"] < 0.5
    assert -1 < metrics["signs/likeness_to_start"] < 1


def test_a_model_without_binary_weights_has_one_group_and_no_metrics_of_signs():
    digits = load_workload("digits", train_size=100)
    with closing(begun(digits)) as run:
        assert len(run.optimizer.param_groups) == 1
        assert "signs/flips_per_step" not in run.metrics()


@needs_bop
@pytest.mark.parametrize("optimizer", ["bop", "bop2", "bop2:unbiased=true,warmup_steps=2"])
def test_an_optimizer_of_signs_is_given_signs_and_the_real_rest(workload, optimizer):
    latent, _ = build_training(begun(workload).config, workload, Arm("baseline"), seed=0, lr=1e-2)
    with closing(begun(workload, optimizer=optimizer)) as run:
        start = [w.sign() for w in workload.binary_parameters(latent)]
        assert all(torch.equal(a, b) for a, b in zip(binary_of(run), start, strict=True))
        binary, real = run.optimizer.param_groups
        assert binary["binary"]
        assert real["lr"] == 1e-2
        head = run.model.fc.weight.detach().clone()
        for _ in run.steps():
            assert all((weight.abs() == 1).all() for weight in binary_of(run))
        assert not torch.equal(run.model.fc.weight, head)


@needs_bop
def test_an_optimizer_of_signs_is_refused_for_a_model_without_binary_weights():
    digits = load_workload("digits", train_size=100)
    with pytest.raises(ValueError, match="optimizer must suit the model, got 'bop', which flips"):
        begun(digits, optimizer="bop")


@needs_bop
def test_a_control_that_sets_rates_by_group_is_refused_with_an_optimizer_of_signs(workload):
    arm = Arm("slower", control=Control(name="slower", head_lr=0.5))
    with pytest.raises(ValueError, match="control 'slower' must not set learning rates for head"):
        begun(workload, arm, optimizer="bop")


def test_a_control_that_sets_rates_keeps_the_binary_groups_apart(workload):
    arm = Arm("slower", control=Control(name="slower", head_lr=0.5))
    with closing(begun(workload, arm)) as run:
        groups = run.optimizer.param_groups
        assert [(group.get("binary"), group["initial_lr"]) for group in groups] == [
            (True, 1e-2),
            (None, 1e-2),
            (None, 5e-3),
        ]


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("bop2:unbiased=true", marks=needs_bop)])
@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(in_two_steps, tmp_path, optimizer, stop):
    with closing(begun(in_two_steps, optimizer=optimizer)) as run:
        list(run.steps())
        wanted = weights_of(run)
        metrics = run.metrics()
    with closing(begun(in_two_steps, optimizer=optimizer)) as run:
        list(islice(run.steps(), stop))
        path = save_checkpoint(run, tmp_path)
    with closing(begun(in_two_steps, optimizer=optimizer)) as run:
        load_checkpoint(run, path)
        list(run.steps())
        assert all(torch.equal(wanted[name], value) for name, value in weights_of(run).items())
        keys = ("signs/flips_per_step", "signs/likeness_to_start")
        assert {key: run.metrics()[key] for key in keys} == {key: metrics[key] for key in keys}


def test_two_steps_train_real_weights_first_and_then_their_signs_on_two_schedules(in_two_steps):
    with closing(begun(in_two_steps)) as run:
        layer = run.model.conv2
        seen = []
        for step in run.steps():
            # `step` are done; the last one was trained with what the layer says now.
            seen.append((step, layer.real_weights, run.optimizer.param_groups[0]["lr"]))
    assert [real for _, real, _ in seen] == [True] * 4 + [False] * 4
    rates = [round(rate / 1e-2, 4) for _, _, rate in seen]
    # Half a cosine over four steps, twice: the rate of the step that comes.
    assert rates == [0.8536, 0.5, 0.1464, 1.0, 0.8536, 0.5, 0.1464, 0.0]


def test_one_step_never_has_real_weights(workload):
    with closing(begun(workload)) as run:
        assert not any(run.model.conv2.real_weights for _ in run.steps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet8"}, "no model named 'resnet8' for workload 'digits-binary'; there is"),
        ({"norm": "group"}, "norm must be 'batch' for model 'binary-cnn', got 'group'"),
        ({"model": "binary-cnn:estimator=steep"}, "estimator must be .*, got 'steep'"),
    ],
)
def test_what_does_not_fit_is_refused(workload, options, message):
    with pytest.raises(ValueError, match=message):
        begun(workload, **options)
