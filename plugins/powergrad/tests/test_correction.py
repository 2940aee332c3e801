import copy
import re
from functools import partial

import pytest
import torch
from regrad_powergrad import PowerGrad, PowerGradCrossEntropyLoss
from regrad_powergrad.functional import power_grad_cross_entropy
from torch import nn, optim
from torch.nn import functional as F


@pytest.fixture
def batch(generator):
    return torch.randn(6, 5, generator=generator, requires_grad=True), torch.tensor(
        [0, 1, 2, 3, 4, -1]
    )


def gradients(batch, *criteria):
    return [torch.autograd.grad(criterion(*batch), batch[0])[0] for criterion in criteria]


class NamedLoss(nn.CrossEntropyLoss):
    """A subclass that keeps the forward."""


class ScaledLoss(nn.CrossEntropyLoss):
    def forward(self, logits, target):
        return 2 * super().forward(logits, target)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, NamedLoss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_module_keeps_its_arguments(kind, reduction, batch, generator):
    options = {
        "weight": torch.rand(5, generator=generator),
        "ignore_index": -1,
        "reduction": reduction,
        "label_smoothing": 0.1,
    }
    corrected = PowerGrad(alpha=0.3).wrap_criterion(kind(**options))
    assert torch.equal(
        *gradients(batch, corrected, partial(power_grad_cross_entropy, alpha=0.3, **options))
    )
    assert torch.equal(corrected(*batch), F.cross_entropy(*batch, **options))


def test_a_module_that_moves_later_is_followed(batch, generator):
    criterion = nn.CrossEntropyLoss(torch.rand(5, generator=generator), ignore_index=-1)
    corrected = PowerGrad().wrap_criterion(criterion)
    criterion.double()
    criterion.label_smoothing = 0.1
    logits = batch[0].detach().double()
    assert torch.equal(corrected(logits, batch[1]), criterion(logits, batch[1]))


def test_the_function_takes_what_torchs_takes(batch, generator):
    corrected = PowerGrad(alpha=0.3).wrap_criterion(F.cross_entropy)
    weight = torch.rand(5, generator=generator)
    options = {"ignore_index": -1, "label_smoothing": 0.1, "reduction": "sum"}
    expected = partial(power_grad_cross_entropy, alpha=0.3, weight=weight, **options)
    called = [
        lambda z, t: corrected(z, t, weight, **options),
        lambda z, t: corrected(input=z, target=t, weight=weight, **options),
    ]
    for call in called:
        assert torch.equal(*gradients(batch, call, expected))


def test_a_partial_of_the_function_keeps_its_arguments(batch):
    corrected = PowerGrad().wrap_criterion(
        partial(F.cross_entropy, ignore_index=-1, label_smoothing=0.1)
    )
    assert torch.equal(
        *gradients(
            batch,
            corrected,
            partial(power_grad_cross_entropy, ignore_index=-1, label_smoothing=0.1),
        )
    )


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), ScaledLoss(), F.nll_loss, partial(F.nll_loss, ignore_index=-1)]
)
def test_other_criteria_are_refused_and_told_what_to_use(criterion):
    message = (
        "criterion must be nn.CrossEntropyLoss or torch.nn.functional.cross_entropy, got .*; if a "
        "loss contains a cross entropy, replace that part with "
        "regrad_powergrad.PowerGradCrossEntropyLoss"
    )
    with pytest.raises(TypeError, match=message):
        PowerGrad().wrap_criterion(criterion)


def test_powergrad_twice_is_refused():
    with pytest.raises(
        TypeError, match="got a PowerGradCrossEntropyLoss, which is PowerGrad already"
    ):
        PowerGrad().wrap_criterion(PowerGradCrossEntropyLoss())


@pytest.mark.parametrize("alpha", [0, -1.0, 1.01, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=re.escape(f"alpha must be in (0, 1], got {alpha!r}")):
        PowerGrad(alpha=alpha)


def test_an_idle_correction_says_why():
    assert PowerGrad(alpha=1).idle_reason() == "alpha is 1, which is plain cross entropy"
    assert "did not call attachment.criterion" in PowerGrad().idle_reason()


def test_probabilities_are_softmax_of_the_scaled_logits(batch):
    assert torch.equal(
        PowerGrad(alpha=0.3).probabilities(batch[0]), torch.softmax(0.3 * batch[0], 1)
    )


# The control. A network with a linear head, trained in float64 by PowerGrad, and by plain cross entropy as
# the control says, on the same batches.


@pytest.fixture
def network(generator):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
            )
    return model


def train(model, optimizer, criterion, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(5, (16,), generator=generator)
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def difference_from_control(
    network, kind, *, alpha, lr, steps=100, control_groups=({}, {}), **options
):
    """Return how far the control ends from PowerGrad, relative to how far PowerGrad went."""
    ours, theirs = copy.deepcopy(network), copy.deepcopy(network)
    correction = PowerGrad(alpha=alpha)
    optimizer = kind(ours.parameters(), lr=lr, **options)
    control = correction.control(optimizer)
    assert (control.name, control.corrections, dict(control.optimizer)) == ("scaled-head", (), {})
    train(ours, optimizer, correction.wrap_criterion(F.cross_entropy), steps)

    with torch.no_grad():
        for parameter in theirs[2].parameters():
            parameter.mul_(control.head_init)
    groups = [
        {"params": theirs[0].parameters(), "lr": lr * control.body_lr, **control_groups[0]},
        {"params": theirs[2].parameters(), "lr": lr * control.head_lr, **control_groups[1]},
    ]
    train(theirs, kind(groups, **options), F.cross_entropy, steps)
    with torch.no_grad():
        for parameter in theirs[2].parameters():
            parameter.div_(control.head_init)
    start, end, other = (
        nn.utils.parameters_to_vector(m.parameters()) for m in (network, ours, theirs)
    )
    return ((end - other).norm() / (end - start).norm()).item()


@pytest.mark.parametrize("alpha", [0.25, 0.3, 0.7])
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_is_plain_cross_entropy_with_a_scaled_head(alpha, momentum, network):
    assert difference_from_control(network, optim.SGD, alpha=alpha, lr=0.1, **momentum) < 5e-15


# eps 1e-30 is below the rounding of every second moment here: what is left is rounding, which Adam's division
# by a small root can enlarge a little.
ADAPTIVE = {
    optim.Adam: {"lr": 1e-2, "eps": 1e-30},
    optim.AdamW: {"lr": 1e-2, "eps": 1e-30, "weight_decay": 0.0},
    optim.NAdam: {"lr": 1e-2, "eps": 1e-30},
    optim.Adamax: {"lr": 1e-2, "eps": 1e-30},
    optim.Adagrad: {"lr": 1e-2, "eps": 1e-30},
    optim.RMSprop: {"lr": 1e-3, "eps": 1e-30, "momentum": 0.9},
}


@pytest.mark.parametrize("alpha", [0.25, 0.3])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_adaptive_optimizers_keep_the_rate_of_the_body(kind, alpha, network):
    assert difference_from_control(network, kind, alpha=alpha, **ADAPTIVE[kind]) < 1e-13


def test_the_usual_eps_is_all_that_separates_adam_from_its_control(network):
    usual = difference_from_control(network, optim.Adam, alpha=0.3, lr=1e-2)
    assert 1e-12 < usual < 1e-4
    scaled_eps = ({"eps": 0.3 * 1e-8}, {})
    assert (
        difference_from_control(network, optim.Adam, alpha=0.3, lr=1e-2, control_groups=scaled_eps)
        < 1e-12
    )


def test_radam_differs_by_its_first_five_steps_only(network):
    # those are lr * m without a second moment: with body_lr = 1/alpha they are equal too
    as_sgd = ({"lr": 1e-2 / 0.3}, {})
    options = {"alpha": 0.3, "lr": 1e-2, "steps": 5}
    assert difference_from_control(network, optim.RAdam, control_groups=as_sgd, **options) < 1e-13
    assert difference_from_control(network, optim.RAdam, **options) > 1e-2


@pytest.mark.parametrize(
    ("kind", "options", "body_decay"),
    [
        (optim.SGD, {"lr": 0.1, "momentum": 0.9}, 0.3),
        (optim.Adam, {"lr": 1e-2, "eps": 1e-30}, 0.3),
        (optim.AdamW, {"lr": 1e-2, "eps": 1e-30}, 1.0),
    ],
)
def test_with_weight_decay_the_control_needs_its_own_decay(kind, options, body_decay, network):
    options = {**options, "weight_decay": 0.05, "alpha": 0.3}
    own_decay = ({"weight_decay": 0.05 * body_decay}, {"weight_decay": 0.05 / 0.3})
    assert difference_from_control(network, kind, control_groups=own_decay, **options) < 1e-12
    assert difference_from_control(network, kind, **options) > 1e-3


@pytest.mark.parametrize("kind", [optim.Adadelta, optim.Adafactor, optim.LBFGS])
def test_there_is_no_control_where_the_step_has_another_scale(kind, network):
    assert PowerGrad().control(kind(network.parameters())) is None


def test_there_is_no_control_where_nothing_is_corrected(network):
    assert PowerGrad(alpha=1).control(optim.SGD(network.parameters(), lr=0.1)) is None
