from types import SimpleNamespace

import pytest
import torch
from regrad_runner.training.run import TrainingRun
from regrad_runner.training.signs import SignMeter

# Weights of Bop after 0 to 3 steps, with γ = .1 and τ = .03; two, three and five signs flipped.
STEPS = [[1, -1, 1, -1, 1], [-1, -1, 1, -1, 1], [-1, 1, 1, 1, 1], [1, 1, -1, 1, 1]]


def test_the_metrics_are_the_shares_worked_out_by_hand():
    weight = torch.tensor(STEPS[0], dtype=torch.float32)
    meter = SignMeter([weight])
    seen = []
    for values in STEPS[1:]:
        weight.copy_(torch.tensor(values))
        meter.look()
        seen.append(meter.metrics()["signs/flips_per_step"])
    # Flips per step are 1/5, 2/5 and 2/5, in the mean of the steps so far.
    assert seen == pytest.approx([0.2, 0.3, 1 / 3])
    # Three of five differ from the start: 1 - 2 · 3/5.
    assert meter.metrics()["signs/likeness_to_start"] == pytest.approx(-0.2)


def test_weights_count_by_their_elements_and_size_does_not_matter():
    first, second = torch.ones(1), torch.full((3,), 0.1)
    meter = SignMeter([first, second])
    first.mul_(-5)
    second.mul_(7)
    meter.look()
    assert meter.metrics() == {"signs/flips_per_step": 0.25, "signs/likeness_to_start": 0.5}


def test_before_the_first_step_nothing_has_changed():
    meter = SignMeter([torch.ones(2)])
    assert meter.metrics() == {"signs/flips_per_step": 0.0, "signs/likeness_to_start": 1.0}


def test_a_loaded_state_goes_on():
    weight = torch.tensor(STEPS[0], dtype=torch.float32)
    meter = SignMeter([weight])
    for values in STEPS[1:3]:
        weight.copy_(torch.tensor(values))
        meter.look()
    again = torch.tensor(STEPS[0], dtype=torch.float32)
    resumed = SignMeter([again])
    again.copy_(weight)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.metrics() == meter.metrics()
    for one, own in ((meter, weight), (resumed, again)):
        own.copy_(torch.tensor(STEPS[3]))
        one.look()
    assert resumed.metrics() == meter.metrics()


def test_binary_weights_are_refused_where_an_engine_cuts_them():
    weight = torch.nn.Parameter(torch.ones(3))
    run = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        workload=SimpleNamespace(binary_parameters=lambda _: [weight]),
        model=None,
        engine=object(),
    )
    with pytest.raises(
        ValueError, match=r"no binary weights with DeepSpeed.* got 1 binary tensors"
    ):
        TrainingRun._make_sign_meter(run)
