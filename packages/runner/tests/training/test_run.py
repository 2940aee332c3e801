import copy
import hashlib
import os
from contextlib import closing

import pytest
import regrad
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from regrad.correction import Control, Correction, Needs
from regrad_runner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from regrad_runner.checkpoints.states import model_state
from regrad_runner.models.heads import head_of
from regrad_runner.results.points import Point, steps_to_target
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training import building
from regrad_runner.training import run as training
from regrad_runner.training.building import build_training
from regrad_runner.training.processes import make_accelerator
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.training.schedule import schedule
from regrad_runner.workloads.loading import load_workload, make_model
from regrad_runner.workloads.workload import Measure
from regrad_testing import run_on_processes

needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad"} <= regrad.available().keys(),
    reason="regrad-xgrad and regrad-powergrad are not installed",
)
SMALL = {
    "batch_size": 32,
    "epochs": 2,
    "width": 4,
    "norm": "group",
    "threads": 1,
    "evaluations_per_epoch": 1,
}
ARMS = [
    Arm("baseline"),
    pytest.param(Arm("xgrad", ("xgrad",)), marks=needs_plugins),
    pytest.param(Arm("xgrad+powergrad", ("xgrad", "powergrad")), marks=needs_plugins),
]


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits", train_size=100)


@pytest.fixture
def config(digits):
    def make(**values):
        return resolved(TrainConfig(**{**SMALL, **values}), digits)

    return make


def trained(config, workload, arm, *, lr=0.05, seed=0):
    """Train to the end; return the points and the weights."""
    with closing(TrainingRun(config, workload, arm, seed=seed, lr=lr)) as run:
        run.train(on_point=lambda point: None, on_step=lambda step: None)
        return run.position.points, {
            name: p.detach().clone() for name, p in run.model.named_parameters()
        }


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def points(*values):
    return [Point(step=10 * i, epoch=i, loss=0.0, value=v, lr=0.1) for i, v in enumerate(values, 1)]


def test_the_schedule_warms_up_along_a_line_and_ends_at_zero():
    factors = [schedule(step, warmup_steps=4, total_steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((0.97, 0.90, 0.97), 30),  # the median of the three is .97 at the third evaluation
        ((0.97, 0.90, 0.90, 0.97, 0.97), 50),  # one good evaluation among three does not count
        ((0.95, 0.96, 0.96), 30),  # reaching it is enough
        ((0.97, 0.97), None),  # two evaluations have no running median of three
        ((0.90, 0.97, 0.90, 0.97, 0.90), 40),
        ((0.90, 0.90, 0.90), None),
    ],
)
def test_steps_to_the_target_are_read_from_the_running_median_of_three(values, step):
    assert steps_to_target(points(*values), Measure(target=0.96)) == step


def test_a_measure_that_should_fall_reaches_its_target_from_above():
    assert steps_to_target(points(3.0, 1.9, 1.8), Measure(target=2.0, higher_is_better=False)) == 30


def test_without_a_target_nothing_is_reached():
    assert steps_to_target(points(1.0, 1.0, 1.0), Measure(target=None)) is None


def test_a_control_scales_the_head_and_the_rates_and_changes_the_optimizer(digits, config):
    control = Control(
        name="c", optimizer={"nesterov": True}, head_init=0.25, head_lr=0.5, body_lr=4.0
    )
    plain, _ = build_training(config(), digits, Arm("baseline"), seed=3, lr=0.1)
    model, optimizer = build_training(config(), digits, Arm("c", control=control), seed=3, lr=0.1)
    assert torch.equal(head_of(model).weight, 0.25 * head_of(plain).weight)
    body, head = optimizer.param_groups
    assert (body["lr"], head["lr"]) == (pytest.approx(0.4), pytest.approx(0.05))
    assert body["nesterov"]
    assert head["nesterov"]
    assert {id(p) for p in head["params"]} == {id(p) for p in head_of(model).parameters()}
    assert len(body["params"]) + len(head["params"]) == len(list(model.parameters()))


def test_a_control_of_another_optimizer_keeps_options_rates_and_weights(digits, config):
    settings = config(optimizer="adamw:weight_decay=0.2,betas=(0.8,0.95)")
    control = Control(
        name="c",
        optimizer_class=torch.optim.NAdam,
        optimizer={"decoupled_weight_decay": True},
        body_lr=4.0,
    )
    plain, _ = build_training(settings, digits, Arm("none"), seed=3, lr=0.1)
    model, optimizer = build_training(settings, digits, Arm("c", control=control), seed=3, lr=0.1)
    assert torch.equal(head_of(model).weight, head_of(plain).weight)
    assert type(optimizer) is torch.optim.NAdam
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"]) == (0.2, (0.8, 0.95))
        assert group["decoupled_weight_decay"]


def test_a_control_that_leaves_the_rates_alone_keeps_one_group(digits, config):
    arm = Arm("nesterov", control=Control(name="nesterov", optimizer={"nesterov": True}))
    assert len(build_training(config(), digits, arm, seed=0, lr=0.1)[1].param_groups) == 1


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.usefixtures("in_float64")
def test_four_parts_of_eight_train_like_one_batch_of_32(digits, config, arm):
    whole_points, whole = trained(config(), digits, arm)
    parts_points, parts = trained(config(accumulate=4), digits, arm)
    assert largest_difference(whole, parts) <= 1e-12
    assert [p.step for p in parts_points] == [p.step for p in whole_points] == [3, 6]
    assert [p.loss for p in parts_points] == pytest.approx(
        [p.loss for p in whole_points], abs=1e-12
    )


@pytest.mark.parametrize("arm", ARMS)
def test_the_same_seed_trains_the_same_model_twice(digits, config, arm):
    first_points, first = trained(config(), digits, arm, seed=5)
    second_points, second = trained(config(), digits, arm, seed=5)
    assert largest_difference(first, second) == 0.0
    assert first_points == second_points


class Noisy(Correction):
    """Draws from the global random state at every step, as no correction should."""

    name = "noisy"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        for gradient in step.gradients:
            gradient.add_(torch.randn_like(gradient), alpha=1e-3)


def batches_of(config, workload, arm):
    seen = []

    def keep(module, inputs):
        if module.training:
            seen.append(hashlib.sha256(inputs[0].numpy().tobytes()).hexdigest())

    with closing(TrainingRun(config, workload, arm, seed=1, lr=0.05)) as run:
        run.model.register_forward_pre_hook(keep)
        run.train(on_point=lambda point: None, on_step=lambda step: None)
    return seen


def test_batch_k_is_the_same_in_every_arm(monkeypatch, digits, config):
    arms = [
        Arm("baseline"),
        Arm("noisy", ("noisy",)),
        Arm("c", control=Control(name="c", head_lr=0.5)),
    ]
    monkeypatch.setattr(training, "create_all", lambda arm: [Noisy()] if arm.corrections else [])
    first, *others = [batches_of(config(epochs=3), digits, arm) for arm in arms]
    assert len(first) == len(set(first)) == 9
    assert others == [first, first]


def test_clipping_bounds_a_step(digits, config):
    free = trained(
        config(optimizer="sgd:momentum=0", epochs=1, train_size=None),
        digits,
        Arm("baseline"),
        lr=0.1,
    )[1]
    bound = config(optimizer="sgd:momentum=0", epochs=1, clip_norm=1e-6)
    start = dict(
        build_training(bound, digits, Arm("baseline"), seed=0, lr=0.1)[0].named_parameters()
    )
    clipped = trained(bound, digits, Arm("baseline"), lr=0.1)[1]
    assert (
        0 < largest_difference(clipped, start) <= 3 * 0.1 * 1e-6 + 1e-7
    )  # three steps, and rounding of the weights
    assert largest_difference(free, start) > 1e-3


@pytest.mark.usefixtures("fresh_precision")
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(digits, config):
    dtypes = []
    with closing(
        TrainingRun(config(mixed_precision="bf16"), digits, Arm("baseline"), seed=0, lr=0.05)
    ) as run:
        run.model.conv.register_forward_hook(
            lambda module, inputs, output: dtypes.append(output.dtype)
        )
        next(run.steps())
        assert set(dtypes) == {torch.bfloat16}
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_leftover_images_wait_for_the_next_epoch(digits, config):
    with closing(
        TrainingRun(config(batch_size=30, accumulate=3), digits, Arm("baseline"), seed=0, lr=0.05)
    ) as run:
        run.train(on_point=lambda point: None, on_step=lambda step: None)
        assert (run.steps_per_epoch, run.position.step) == (3, 6)


def test_a_run_that_was_not_touched_says_so(digits, config):
    with closing(TrainingRun(config(epochs=1), digits, Arm("baseline"), seed=0, lr=0.05)) as run:
        run.train(on_point=lambda point: None, on_step=lambda step: None)
        assert not run.touched()


@needs_plugins
def test_a_run_that_was_touched_says_so(digits, config):
    with closing(
        TrainingRun(config(epochs=1), digits, Arm("xgrad", ("xgrad",)), seed=0, lr=0.05)
    ) as run:
        run.train(on_point=lambda point: None, on_step=lambda step: None)
        assert run.touched()


def float64_model(*args, **kwargs):
    return make_model(*args, **kwargs).double()


def sharding(config):
    """Return an accelerator that shards, as accelerate does where there are devices."""
    accelerator = make_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=500,
        cpu_ram_efficient_loading=False,
    )
    return accelerator


def outcome(names, folder):
    """Train with some corrections as one of two processes, and go on from a checkpoint."""
    digits = load_workload("digits", train_size=100)
    asked = TrainConfig(**SMALL, accumulate=2, clip_norm=1.0, processes=2)
    setting = (resolved(asked, digits), digits, Arm(names, tuple(filter(None, names.split("+")))))
    paths = []

    def save(step):
        if step == 4:
            paths.append(save_checkpoint(run, folder))

    run = TrainingRun(*setting, seed=0, lr=0.05)
    run.train(on_point=lambda point: None, on_step=save)
    weights = model_state(run.accelerator.unwrap_model(run.model))
    came = {
        "weights": weights,
        "losses": [p.loss for p in run.position.points],
        "values": [p.value for p in run.position.points],
        "parts": parts_of(run, digits),
        "sharded": run.attachment.engine.is_sharded(),
        "norms": run.watch.table(),
    }
    run.close()
    again = TrainingRun(*setting, seed=0, lr=0.05)
    load_checkpoint(again, paths[0])
    again.train(on_point=lambda point: None, on_step=lambda step: None)
    other = model_state(again.accelerator.unwrap_model(again.model))
    same = all(torch.equal(other[name], weight) for name, weight in weights.items())
    again.close()
    return {**came, "resumed_exactly": same and again.position.points == run.position.points}


def outcomes(rank, folder, all_names):
    """Train on both layouts as one of two processes; the first writes what came of it."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    building.make_model = float64_model
    results = {}
    for layout, make in (("ddp", make_accelerator), ("fsdp2", sharding)):
        training.make_accelerator = make
        for names in all_names:
            results[layout, names] = outcome(names, folder / f"{layout}-{names or 'baseline'}")
    if rank == 0:
        torch.save(results, folder / "out.pt")


def parts_of(run, digits):
    """Return the value on very few images, and on an odd number of them."""
    return [run.value_on(first_of(digits.test, size)) for size in (1, 359)]


def first_of(images, size):
    part = copy.copy(images)
    part.images, part.labels = images.images[:size], images.labels[:size]
    return part


def norms_in(table):
    """Return the gradients' norms of the last step."""
    return [float(cell) for cell in table.splitlines()[-1].split(",")[2:]]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("in_float64")
def test_two_processes_train_like_one_and_resume_exactly(tmp_path, digits, config):
    names = ["", "xgrad+powergrad"] if {"xgrad", "powergrad"} <= regrad.available().keys() else [""]
    run_on_processes(outcomes, tmp_path, names, patience=600)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in names:
        arm = Arm(name, tuple(filter(None, name.split("+"))))
        with closing(TrainingRun(config(clip_norm=1.0), digits, arm, seed=0, lr=0.05)) as run:
            run.train(on_point=lambda point: None, on_step=lambda step: None)
            one, points = dict(run.model.named_parameters()), run.position.points
            parts = parts_of(run, digits)
            norms = norms_in(run.watch.table())
        for layout in ("ddp", "fsdp2"):
            came = two[layout, name]
            assert came["sharded"] == (layout == "fsdp2")
            assert largest_difference(one, {key: came["weights"][key] for key in one}) <= 1e-12
            assert came["losses"] == pytest.approx([p.loss for p in points], abs=1e-12)
            assert came["values"] == [p.value for p in points]
            assert came["parts"] == parts
            assert norms_in(came["norms"]) == pytest.approx(norms, rel=1e-5)
            assert came["resumed_exactly"]
