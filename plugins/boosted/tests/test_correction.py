"""Boosted exits through `regrad.attach`: criteria, outputs of all kinds, evaluation, measures."""

import re
from functools import partial

import pytest
import regrad
import torch
from regrad_boosted import Boosted
from regrad_boosted.functional import boosted_cross_entropy, running_sum
from regrad_testing.problem import SumOverExits
from torch import nn
from torch.nn import functional as F


class ThreeExits(nn.Module):
    """Three linear stages with an exit each; says how it returns their logits."""

    def __init__(self, form=tuple):
        super().__init__()
        self.form = form
        self.stages = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)])
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs):
        outputs = []
        features = inputs
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = torch.tanh(stage(features))
            outputs.append(head(features))
        return self.form(outputs)


def in_mapping(outputs):
    return {"features": torch.zeros(1), **dict(zip(("low", "mid", "high"), outputs, strict=True))}


def attached(correction, criterion, form=tuple):
    model = ThreeExits(form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, regrad.attach(model, optimizer, [correction], criterion)


@pytest.fixture
def batch(generator):
    return torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1, -1])


CRITERIA = {
    "module": lambda: nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1),
    "partial": lambda: partial(F.cross_entropy, ignore_index=-1, label_smoothing=0.1),
    "of several outputs": lambda: SumOverExits(
        nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    ),
}


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("form", [tuple, list])
def test_the_loss_is_the_function_with_the_criterions_settings(kind, form, batch):
    model, _, attachment = attached("boosted:decay=0.3", CRITERIA[kind](), form)
    inputs, target = batch
    outputs = model(inputs)
    wanted = boosted_cross_entropy(outputs, target, decay=0.3, ignore_index=-1, label_smoothing=0.1)
    loss = attachment.criterion(outputs, target)
    assert torch.equal(loss, wanted)
    weights = list(model.parameters())
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    theirs = torch.autograd.grad(wanted, weights)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_function_takes_settings_at_the_call(batch):
    model, _, attachment = attached("boosted", F.cross_entropy)
    outputs = model(batch[0])
    loss = attachment.criterion(outputs, batch[1], ignore_index=-1)
    assert torch.equal(loss, boosted_cross_entropy(outputs, batch[1], ignore_index=-1))


def test_a_mapping_is_read_by_the_names_of_its_exits(batch):
    correction = Boosted(exits=("low", "mid", "high"))
    model, _, attachment = attached(correction, nn.CrossEntropyLoss(ignore_index=-1), in_mapping)
    outputs = model(batch[0])
    wanted = boosted_cross_entropy(
        [outputs[name] for name in ("low", "mid", "high")], batch[1], ignore_index=-1
    )
    assert torch.equal(attachment.criterion(outputs, batch[1]), wanted)
    wanted.backward()
    assert attachment.metrics()["boosted/criterion/share_touched"] == pytest.approx(2 / 3)


def test_evaluation_judges_the_sum_and_detach_brings_the_users_criterion_back(batch):
    criterion = nn.CrossEntropyLoss(ignore_index=-1)
    model, _, attachment = attached("boosted", criterion)
    outputs = model.eval()(batch[0])
    wanted = criterion(running_sum(outputs)[-1], batch[1])
    assert torch.equal(attachment.criterion(outputs, batch[1]), wanted)
    # what a model with exits for training alone returns
    assert torch.equal(attachment.criterion(outputs[2], batch[1]), criterion(outputs[2], batch[1]))
    attachment.detach()
    assert torch.equal(attachment.criterion(outputs[2], batch[1]), criterion(outputs[2], batch[1]))


def test_a_criterion_of_several_outputs_judges_evaluation_itself(batch):
    criterion = SumOverExits(nn.CrossEntropyLoss(ignore_index=-1))
    model, _, attachment = attached("boosted", criterion)
    outputs = model.eval()(batch[0])
    assert torch.equal(attachment.criterion(outputs, batch[1]), criterion(outputs, batch[1]))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), SumOverExits(nn.CrossEntropyLoss())])
def test_the_meter_compares_with_the_plain_sum(criterion, batch):
    inputs, target = batch[0], batch[1].abs()
    model, _, attachment = attached("boosted", criterion)
    attachment.criterion(model(inputs), target).backward()
    metrics = attachment.metrics()
    # of the three logits' gradients the first is the same
    assert metrics["boosted/criterion/share_touched"] == pytest.approx(2 / 3)
    assert 0 < metrics["boosted/criterion/relative_change"] < 2


def test_predictions_are_running_sums(batch):
    model, _, attachment = attached("boosted:decay=0.25", nn.CrossEntropyLoss())
    outputs = model(batch[0])
    wanted = running_sum(outputs, decay=0.25)
    for found in (
        attachment.criterion.predictions(outputs),
        attachment.corrections[0].predictions(outputs),
    ):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_metrics_are_those_of_the_last_batch_worked_out_by_hand():
    correction = Boosted()
    criterion = correction.wrap_criterion(nn.CrossEntropyLoss(ignore_index=-1))
    outputs = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[-4.0, 0.0], [0.0, 3.0]])]
    assert correction.metrics() == {}
    criterion([output * 9 for output in outputs], torch.tensor([0, 0]))
    criterion(outputs, torch.tensor([0, -1]))
    # F_2 = ((-3, 0), (0, 3)), and of the two rows the first counts
    assert correction.metrics() == pytest.approx(
        {
            "exit1_loss": 0.12692801,
            "exit1_accuracy": 1.0,
            "exit1_increment_share": 1.0,
            "exit2_loss": 3.04858735,
            "exit2_accuracy": 0.0,
            "exit2_increment_share": 5 / 18**0.5,
        }
    )


def test_accuracy_of_probabilities_is_that_of_their_largest():
    correction = Boosted()
    criterion = correction.wrap_criterion(nn.CrossEntropyLoss())
    criterion([torch.tensor([[2.0, 0.0], [0.0, 1.0]])], torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert correction.metrics()["exit1_accuracy"] == 0.5


def test_rescaling_divides_the_gradients_of_the_trunk_alone(batch):
    inputs, target = batch[0], batch[1].abs()
    gradients = {}
    for rescale in (False, True):
        model, _, attachment = attached(Boosted(rescale=rescale), nn.CrossEntropyLoss())
        attachment.criterion(model(inputs), target).backward()
        gradients[rescale] = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients[True].items():
        exits = 3 - int(name.split(".")[1]) if name.startswith("stages") else 1
        assert torch.allclose(gradient, gradients[False][name] / exits, rtol=1e-4), name


def test_with_adam_rescaling_is_no_more_than_another_eps(batch):
    # Adam's steps do not depend on the scale of a parameter's gradients.
    inputs, target = batch[0].double(), batch[1].abs()
    ends = []
    for rescale in (False, True):
        model = ThreeExits().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30)
        correction = Boosted(rescale=rescale)
        with regrad.attach(model, optimizer, [correction], nn.CrossEntropyLoss()) as attachment:
            for _ in range(5):
                optimizer.zero_grad()
                attachment.criterion(model(inputs), target).backward()
                optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(*ends, rtol=0, atol=1e-9)


def test_one_exit_trains_plainly_and_says_why(batch):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss(ignore_index=-1)
    with regrad.attach(model, optimizer, ["boosted"], criterion) as attachment:
        logits = model(batch[0])
        assert torch.equal(attachment.criterion(logits, batch[1]), criterion(logits, batch[1]))
        (correction,) = attachment.corrections
        assert correction.idle_reason() == "the model has one exit, which has none before it"


def test_an_idle_correction_says_why():
    assert "did not call attachment.criterion" in Boosted().idle_reason()
    assert Boosted(decay=0).idle_reason() is None


def test_the_control_is_the_plain_sum_with_the_same_rescaling_and_exits():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert Boosted().control(optimizer) is None  # the baseline is the plain sum
    assert Boosted(decay=0, rescale=True).control(optimizer) is None
    correction = Boosted(rescale=True, exits=("a", "b c"))
    control = correction.control(optimizer)
    assert control.name == "rescaled-sum"
    (made,) = map(regrad.create, control.corrections)
    assert made.options == Boosted(decay=0.0, rescale=True, exits=("a", "b c")).options


class Doubled(nn.CrossEntropyLoss):
    def forward(self, logits, target):
        return 2 * super().forward(logits, target)


@pytest.mark.parametrize(
    "criterion",
    [nn.MSELoss(), Doubled(), partial(F.cross_entropy, torch.zeros(1)), SumOverExits(nn.MSELoss())],
)
def test_other_criteria_are_refused_and_told_what_to_use(criterion):
    message = (
        "(?s)criterion must be nn.CrossEntropyLoss or torch.nn.functional.cross_entropy, got .*replace "
        "that part with regrad_boosted.functional.boosted_cross_entropy"
    )
    with pytest.raises(TypeError, match=message):
        Boosted().wrap_criterion(criterion)


OUTPUTS = {
    "no names": ({}, {"low": torch.zeros(1, 2)}, ValueError, "got none; there are low"),
    "a name that is not there": (
        {"exits": ("low", "hgh")},
        {"low": torch.zeros(1, 2), "high": torch.zeros(1, 2)},
        ValueError,
        "exits must name entries of what the model returns, got 'hgh'; there are low, high",
    ),
    "names for a tuple": (
        {"exits": ("low",)},
        (torch.zeros(1, 2),),
        TypeError,
        "model must return a mapping where exits names its entries, got tuple; leave exits out",
    ),
    "an object": ({}, object(), TypeError, "in a tuple, list or mapping, got object"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_cannot_be_read_are_refused_in_words(case):
    options, outputs, error, message = OUTPUTS[case]
    criterion = Boosted(**options).wrap_criterion(nn.CrossEntropyLoss())
    with pytest.raises(error, match=re.escape(message)):
        criterion(outputs, torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, "decay must be in [0, 1], got -0.1"),
        ({"decay": float("nan")}, "decay must be in [0, 1], got nan"),
        ({"alpha": 0.0}, "alpha must be in (0, 1], got 0.0"),
        ({"exit_weights": (0.0,)}, "exit_weights must be positive and finite, got (0.0,)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Boosted(**options)


def test_powergrad_and_boosted_exits_cannot_share_the_criterion():
    class Other(regrad.Correction):
        name = "other"
        needs = regrad.correction.Needs(stages=("criterion",), reads=("criterion",))

        def wrap_criterion(self, criterion):
            return criterion

    model = ThreeExits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(regrad.RegradError, match="criterion"):
        regrad.attach(model, optimizer, [Boosted(), Other()], nn.CrossEntropyLoss())
