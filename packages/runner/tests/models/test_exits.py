import copy

import pytest
import torch
from regrad_runner.models.building import build_model
from regrad_runner.models.exits import SumOverExits, exits_of, multiply_adds, predictions
from regrad_runner.models.heads import head_of
from torch import nn
from torch.nn import functional as F

DIGITS = {"classes": 10, "channels": 1, "image_size": 8, "width": 4}


@pytest.fixture
def model():
    return build_model("multiexit8", **DIGITS)


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_with_exits_answers_after_every_stage(model, images):
    outputs = model(images)
    assert [output.shape for output in outputs] == [(5, 10)] * 3
    assert exits_of(model) == 3
    assert exits_of(build_model("resnet8", **DIGITS)) == 1


def test_its_trunk_is_that_of_the_residual_network(model, images):
    plain = build_model("resnet8", **DIGITS)
    for name in ("conv", "norm", "stages"):
        getattr(plain, name).load_state_dict(getattr(model, name).state_dict())
    plain.fc.load_state_dict(model.heads[-1].state_dict())
    assert torch.equal(model(images)[-1], plain(images))


def test_its_output_layer_is_that_of_the_last_exit(model):
    assert head_of(model) is model.heads[-1]


def test_an_exit_reads_no_later_stage(model, images):
    first = model.eval()(images)[0]
    with torch.no_grad():
        model.stages[1][0].conv1.weight.mul_(-1)
    assert torch.equal(model(images)[0], first)


def test_the_sum_over_exits_is_the_sum(images):
    criterion = SumOverExits(nn.CrossEntropyLoss(label_smoothing=0.1))
    outputs = build_model("multiexit8", **DIGITS)(images)
    target = torch.arange(5)
    wanted = sum(F.cross_entropy(output, target, label_smoothing=0.1) for output in outputs)
    assert torch.equal(criterion(outputs, target), wanted)


class Doubling(nn.CrossEntropyLoss):
    def predictions(self, outputs):
        return [2 * output for output in outputs]


def test_exits_predict_with_what_the_criterion_says():
    outputs = (torch.zeros(1, 2), torch.ones(1, 2))
    assert predictions(nn.CrossEntropyLoss(), outputs) == [*outputs]
    assert predictions(Doubling(), outputs)[1].tolist() == [[2.0, 2.0]]
    assert predictions(Doubling(), outputs[1]) == [outputs[1]]


def test_multiply_adds_are_those_worked_out_by_hand(model):
    # 8 x 8 pixels: the stem 9 · 1 · 4 and two convolutions 9 · 4 · 4 each, then the head 4 · 10
    first = 64 * (36 + 2 * 144) + 40
    # 4 x 4 pixels: 9 · 4 · 8 and 9 · 8 · 8, head 8 · 10
    second = first + 16 * (288 + 576) + 80
    # 2 x 2 pixels: 9 · 8 · 16 and 9 · 16 · 16, head 16 · 10
    third = second + 4 * (1152 + 2304) + 160
    assert multiply_adds(model, torch.zeros(1, 1, 8, 8)) == [first, second, third]


def test_counting_leaves_the_model_alone(model):
    before = copy.deepcopy(model.state_dict())
    multiply_adds(model, torch.ones(1, 1, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
