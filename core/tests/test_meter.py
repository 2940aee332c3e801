"""The effect meter, against numbers worked out by hand."""

import math
import warnings

import pytest
import regrad
import torch
from regrad import RegradWarning
from regrad.correction import Needs
from regrad.meter import compare
from torch import nn

MEASURES = {"share_touched", "relative_change", "cosine", "trigger_rate", "non_finite"}


class Two(nn.Module):
    """Two parameters whose gradients are (3, 4) and (0, 12), together of norm 13."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([2.0, 0.0], dtype=torch.float64))

    def forward(self):
        return self.a @ self.a.new_tensor([3.0, 4.0]) + self.b @ self.b.new_tensor([0.0, 12.0])


class Steps:
    """A model of two parameters with corrections attached; call it to step."""

    def __init__(self, corrections, **options):
        self.model = Two()
        self.optimizer = torch.optim.SGD(self.model.parameters(), **{"lr": 0.0, **options})
        self.attachment = regrad.attach(self.model, self.optimizer, corrections)

    def __call__(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model().backward()
            self.optimizer.step()
        return self

    def effect(self, name, stage):
        return self.attachment.receipt()["effects"].get(name, {}).get(stage)


@pytest.fixture
def double_a(toys):
    """A gradient correction that doubles the gradient of `a` in the steps that `when` accepts."""

    def make(when=lambda index: True, **needs):
        class DoubleA(toys.Scale):
            def correct_gradients(self, step):
                if when(step.index):
                    step.gradients[step.names.index("a")].mul_(2)

        DoubleA.needs = Needs(stages=("gradient",), **needs)
        return DoubleA()

    return make


def test_a_gradient_stage_has_the_numbers_worked_out_by_hand(double_a):
    effect = Steps([double_a()])().effect("scale", "gradient")
    # (3, 4, 0, 12) becomes (6, 8, 0, 12): the change (3, 4) has norm 5, the inner product is 18 + 32 + 144.
    expected = {
        "share_touched": 1 / 2,
        "relative_change": 5 / 13,
        "cosine": 194 / (13 * math.sqrt(244)),
        "trigger_rate": 1.0,
        "non_finite": 0.0,
    }
    assert effect == pytest.approx(expected, rel=1e-6)


def test_the_trigger_rate_is_the_share_of_measured_steps_with_a_change(double_a):
    steps = Steps([double_a(lambda index: index % 4 == 0)])(8)
    effect = steps.effect("scale", "gradient")
    assert effect["trigger_rate"] == pytest.approx(2 / 8)
    assert effect["share_touched"] == pytest.approx(1 / 2 * 2 / 8)
    assert effect["relative_change"] == pytest.approx(5 / 13 * 2 / 8)


def test_the_first_twenty_steps_and_then_every_fiftieth_are_measured(double_a):
    steps = Steps([double_a(lambda index: index < 20)])(50)
    assert steps.effect("scale", "gradient")["trigger_rate"] == pytest.approx(1)
    assert steps().effect("scale", "gradient")["trigger_rate"] == pytest.approx(20 / 21)
    assert steps(50).effect("scale", "gradient")["trigger_rate"] == pytest.approx(20 / 22)


def test_the_first_steps_after_the_warm_up_are_measured_too(double_a):
    steps = Steps([double_a(lambda index: index >= 30, warmup_steps=30)])(50)
    assert steps.effect("scale", "gradient")["trigger_rate"] == pytest.approx(20 / 40)


def test_turning_and_vanishing_gradients_have_the_right_cosine(toys):
    for factor, cosine in ((-1.0, -1.0), (0.0, 0.0), (3.0, 1.0)):

        class Turn(toys.Add):
            def correct_gradients(self, step, factor=factor):
                for gradient in step.gradients:
                    gradient.mul_(factor)

        effect = Steps([Turn()])().effect("add", "gradient")
        assert effect["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert effect["relative_change"] == pytest.approx(abs(factor - 1), rel=1e-6)


def test_each_correction_is_measured_against_what_the_one_before_it_left(toys):
    effects = Steps([toys.Scale(factor=0.5), toys.Add(amount=1.0)])()
    assert effects.effect("scale", "gradient")["relative_change"] == pytest.approx(0.5)
    # Four entries change by 1 after the norm of 13 was halved.
    assert effects.effect("add", "gradient")["relative_change"] == pytest.approx(2 / 6.5)


def test_a_correction_that_makes_numbers_not_finite_is_counted(toys):
    class Breaks(toys.Add):
        def correct_gradients(self, step):
            if step.index == 1:
                step.gradients[0][0] = float("nan")

    effect = Steps([Breaks()])(4).effect("add", "gradient")
    assert effect["non_finite"] == pytest.approx(1 / 4)


def test_displacements_are_measured_against_the_weights(toys):
    class MoveA(toys.Shift):
        def predict_weights(self, step):
            moves = super().predict_weights(step)
            return [m if n == "a" else None for n, m in zip(step.names, moves, strict=True)]

    effect = Steps([MoveA(amount=1.0)])().effect("shift", "weights")
    # a = (1, 2) becomes (2, 3): the change has norm √2, the weight √5, the inner product is 8.
    assert effect["relative_change"] == pytest.approx(math.sqrt(2 / 5))
    assert effect["cosine"] == pytest.approx(8 / math.sqrt(5 * 13))
    assert effect["trigger_rate"] == 1


def test_moments_are_measured_before_and_after(toys):
    steps = Steps([toys.Boost(amount=1.0)], momentum=0.9)()
    assert steps.effect("boost", "moment") is None
    steps()
    # The second step finds the buffers (3, 4) and (0, 12): four entries change by 1.
    measured = steps.effect("boost", "moment")
    assert measured["relative_change"] == pytest.approx(2 / 13)
    assert measured["share_touched"] == 1


def test_counters_in_the_optimizer_are_no_moments(toys):
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    attachment = regrad.attach(model, optimizer, [toys.Boost(amount=1.0)])
    for _ in range(2):
        model().backward()
        optimizer.step()
    # Two parameters have two averages and a step count each; one of the averages is changed.
    assert attachment.receipt()["effects"]["boost"]["moment"]["share_touched"] == 1 / 2


def test_the_criterion_is_measured_by_its_logit_gradient(toys):
    model = toys.Net()
    attachment = regrad.attach(
        model, toys.sgd(model), [toys.Louder(factor=3.0)], nn.CrossEntropyLoss()
    )
    inputs, labels = toys.batch()
    attachment.criterion(model(inputs), labels).backward()
    effect = attachment.receipt()["effects"]["louder"]["criterion"]
    assert effect["relative_change"] == pytest.approx(2, rel=1e-5)
    assert effect["cosine"] == pytest.approx(1, rel=1e-5)
    assert effect["trigger_rate"] == 1


def test_measuring_the_criterion_changes_no_gradient_and_no_random_number(toys, same_bits):
    gradients = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = toys.Messy()
        criterion = nn.CrossEntropyLoss()
        if measured:
            louder = toys.Louder(factor=1.0)
            criterion = regrad.attach(model, toys.sgd(model), [louder], criterion).criterion
        inputs, labels = toys.batch(dtype=torch.float32)
        criterion(model(inputs), labels).backward()
        gradients.append(({n: p.grad for n, p in model.named_parameters()}, torch.get_rng_state()))
    assert same_bits(*gradients)


def test_measuring_a_criterion_that_draws_random_numbers_draws_none_of_its_own(toys):
    def noisy(logits, labels):
        return nn.functional.cross_entropy(logits + torch.rand_like(logits), labels)

    states = []
    for attached in (False, True):
        model, criterion = toys.Net(), noisy
        if attached:
            criterion = regrad.attach(model, toys.sgd(model), [toys.Louder()], noisy).criterion
        torch.manual_seed(0)
        criterion(model(toys.batch()[0]), toys.batch()[1]).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_meters_measure_before_an_optimizer_clears_the_gradients(toys):
    class Clears(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return loss

    model = Two()
    attachment = regrad.attach(model, Clears(model.parameters(), lr=0.1), [toys.Scale(factor=0.5)])
    model().backward()
    attachment.optimizer.step()
    assert model.a.grad is None
    assert attachment.receipt()["effects"]["scale"]["gradient"]["relative_change"] == pytest.approx(
        0.5
    )


def test_metrics_are_flat_plain_floats(toys):
    tally = toys.Tally()
    metrics = Steps([toys.Scale(), tally])(3).attachment.metrics()
    assert {key: type(value) for key, value in metrics.items()} == dict.fromkeys(metrics, float)
    assert metrics["steps_applied"] == 3
    assert metrics["steps_skipped"] == 0
    assert metrics["tally/names"] == 2
    assert {f"scale/gradient/{measure}" for measure in MEASURES} <= set(metrics)


def quiet(steps, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(count)


def idle_gradient(toys, reason):
    class Idle(toys.Scale):
        def idle_reason(self):
            return reason

    return Idle(factor=1.0)


def idle_window(toys, reason):
    class Idle(toys.Shift):
        def predict_weights(self, step):
            return None

        def idle_reason(self):
            return reason

    return Idle()


def idle_filter(toys, reason):
    class Idle(toys.Shift):
        def predict_weights(self, step):
            return [None] * len(step.parameters)

        def idle_reason(self):
            return reason

    return Idle()


def idle_moment(toys, reason):
    class Idle(toys.Boost):
        def idle_reason(self):
            return reason

    return Idle(amount=1.0)


@pytest.mark.parametrize("make", [idle_gradient, idle_window, idle_filter, idle_moment])
def test_a_correction_without_effect_is_warned_about_once_after_two_hundred_steps_with_its_reason(
    toys, make
):
    steps = Steps([make(toys, "the threshold was never reached")])
    quiet(steps, 199)
    with pytest.warns(
        RegradWarning, match="had no effect in 20[01] steps: the threshold was never reached"
    ) as caught:
        steps(2)
    assert len(caught) == 1
    quiet(steps, 250)


def test_a_criterion_that_the_loop_never_calls_is_warned_about(toys):
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regrad.attach(model, optimizer, [toys.Louder()], nn.CrossEntropyLoss())
    model().backward()
    with pytest.warns(RegradWarning, match="'louder' .* without a call to attachment.criterion"):
        optimizer.step()


def test_the_warm_up_is_not_counted_as_idle(double_a):
    steps = Steps([double_a(lambda index: False, warmup_steps=40)])
    quiet(steps, 239)
    with pytest.warns(RegradWarning, match="'scale' had no effect"):
        steps(2)


@pytest.mark.parametrize("make", [idle_gradient, idle_window, idle_filter, idle_moment])
def test_a_correction_for_which_doing_nothing_is_normal_is_never_warned_about(toys, make):
    quiet(Steps([make(toys, None)]), 260)


def test_one_effect_is_enough_for_silence(double_a):
    quiet(Steps([double_a(lambda index: index == 3)]), 260)


def test_a_correction_that_hooks_submodules_only_is_not_warned_about(toys):
    class Hidden(regrad.Correction):
        name = "hidden"
        needs = Needs(stages=("hidden",))

        def setup(self, attachment):
            pass

    quiet(Steps([Hidden()]), 260)


def test_resuming_shortly_before_the_two_hundredth_step_does_not_call_an_effect_missing(double_a):
    first = Steps([double_a()])(190)
    second = Steps([double_a()])
    second.attachment.load_state_dict(first.attachment.state_dict())
    quiet(second, 60)


@pytest.mark.parametrize("stage", ["gradient", "moment"])
def test_a_hook_of_a_stage_in_which_an_instance_does_not_act_is_neither_called_nor_measured(
    toys, stage
):
    class Either(toys.Scale):
        """Declares two stages for the class; each object acts in one."""

        name = "either"
        needs = Needs(stages=("gradient", "moment"))

        def __init__(self, stage):
            super().__init__()
            self.needs = Needs(stages=(stage,))

        def correct_moments(self, step):
            for parameter in step.parameters:
                step.optimizer.state[parameter]["momentum_buffer"].mul_(2)

    run = Steps([], momentum=0.9)
    run()
    run.attachment.detach()
    attachment = regrad.attach(run.model, run.optimizer, [Either(stage)])
    run()
    factor = 0.5 if stage == "gradient" else 2
    assert attachment.metrics()[f"either/{stage}/relative_change"] == pytest.approx(abs(factor - 1))
    assert attachment.engine.meter.effects()["either"].keys() == {stage}
    assert attachment.receipt()["corrections"][0]["stages"] == [stage]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_counted_and_spoils_no_mean(toys, value):
    steps = Steps([toys.Scale(factor=0.5)])
    steps(2)
    steps.optimizer.zero_grad()
    steps.model().backward()
    steps.model.a.grad[0] = value
    steps.optimizer.step()
    effect = steps.effect("scale", "gradient")
    assert effect["relative_change"] == pytest.approx(0.5)
    assert effect["cosine"] == pytest.approx(1.0)
    assert effect["non_finite"] == pytest.approx(1 / 3)
    assert effect["trigger_rate"] == 1


def test_a_step_in_which_nothing_is_finite_leaves_the_means_of_the_others(toys):
    steps = Steps([toys.Scale(factor=0.5)])
    steps.model().backward()
    for parameter in steps.model.parameters():
        parameter.grad.fill_(torch.inf)
    steps.optimizer.step()
    assert set(steps.effect("scale", "gradient")) == {
        *("share_touched", "trigger_rate", "non_finite")
    }
    steps(1)
    assert steps.effect("scale", "gradient")["relative_change"] == pytest.approx(0.5)
    assert all(math.isfinite(value) for value in steps.attachment.metrics().values())


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_whose_squares_leave_float32_are_measured(toys, size, dtype):
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    model = nn.Module()
    model.weight = parameter
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    attachment = regrad.attach(model, optimizer, [toys.Scale(factor=0.5)])
    attachment.engine.forwards = 1  # no forward is under test here
    parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    effect = attachment.receipt()["effects"]["scale"]["gradient"]
    assert effect["relative_change"] == pytest.approx(0.5)
    assert effect["non_finite"] == 0


def test_moments_of_a_parameter_without_dimensions_are_measured(toys):
    model = nn.Module()
    model.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = regrad.attach(model, optimizer, [toys.Boost(amount=0.5)])
    for _ in range(2):
        attachment.engine.forwards = 1  # no forward is under test here
        model.gain.grad = torch.ones_like(model.gain)
        optimizer.step()
    effect = attachment.receipt()["effects"]["boost"]["moment"]
    assert effect["trigger_rate"] > 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_tensors_without_elements_are_measured_as_unchanged(shape):
    before = [torch.zeros(shape), torch.tensor([3.0, 4.0])]
    after = [torch.zeros(shape), torch.tensor([3.0, 2.0])]
    assert compare(before, after).tolist() == [
        [0.0] * 5,
        [2.0, 2.0, 5.0, pytest.approx(13.0**0.5), 0.0],
    ]


def test_a_parameter_without_elements_takes_part_in_every_stage_and_is_measured(toys):
    model = toys.Net()
    model.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
    optimizer = toys.sgd(model)
    corrections = [toys.Shift(), toys.Scale(factor=0.5), toys.Boost()]
    attachment = regrad.attach(model, optimizer, corrections)
    for seed in range(3):
        optimizer.zero_grad()
        (toys.loss_of(model, seed=seed) + model.empty.sum()).backward()
        optimizer.step()
    assert model.empty.grad.shape == (0, 4)
    metrics = attachment.metrics()
    assert metrics["steps_applied"] == 3
    assert metrics["scale/gradient/relative_change"] == pytest.approx(0.5)
    assert metrics["scale/gradient/non_finite"] == 0
