"""PowerGrad through `regrad.attach`, in loops as users write them."""

import copy
import re
from pathlib import Path

import pytest
import regrad
import torch
from regrad_powergrad import PowerGrad, PowerGradCrossEntropyLoss
from torch import nn


@pytest.fixture
def data(generator):
    return torch.randn(4, 32, 6, generator=generator), torch.randint(
        5, (4, 32), generator=generator
    )


@pytest.fixture
def make():
    """Return a function that makes the same model and optimizer every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def model_and_optimizer():
        twin = copy.deepcopy(model)
        return twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)

    return model_and_optimizer


def train(model, optimizer, criterion, data, *, parts=1, scaler=None, closure=False):
    """One optimizer step per batch of `data`, each in `parts` micro-batches."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for inputs, target in zip(*data, strict=True):

        def evaluate(inputs=inputs, target=target):
            optimizer.zero_grad()
            for micro, labels in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                scaler.scale(criterion(model(micro), labels) / parts).backward()

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            scaler.step(optimizer)
            scaler.update()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def expected(make, data):
    return train(*make(), PowerGradCrossEntropyLoss(alpha=0.3), data)


@pytest.mark.parametrize("closure", [False, True], ids=["step()", "step(closure)"])
def test_an_attached_loop_trains_as_with_the_loss_itself(closure, make, data, expected):
    model, optimizer = make()
    with regrad.attach(
        model, optimizer, ["powergrad:alpha=0.3"], nn.CrossEntropyLoss()
    ) as attachment:
        assert torch.equal(
            train(model, optimizer, attachment.criterion, data, closure=closure), expected
        )
        assert attachment.metrics()["steps_applied"] == 4


def test_a_scaled_loss_in_an_attached_loop_changes_nothing(make, data, expected):
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with regrad.attach(
        model, optimizer, [PowerGrad(alpha=0.3)], nn.CrossEntropyLoss()
    ) as attachment:
        assert torch.equal(
            train(model, optimizer, attachment.criterion, data, scaler=scaler), expected
        )


def test_micro_batches_in_an_attached_loop_are_the_whole_batch(make, data, expected):
    model, optimizer = make()
    with regrad.attach(
        model, optimizer, [PowerGrad(alpha=0.3)], nn.CrossEntropyLoss()
    ) as attachment:
        weights = train(model, optimizer, attachment.criterion, data, parts=4)
    # float32 sums of 4 x 8 rows and of 32 round differently
    assert torch.allclose(weights, expected, rtol=0, atol=1e-6)


def test_evaluation_and_detach_bring_the_users_criterion_back(make, data):
    model, optimizer = make()
    plain = nn.CrossEntropyLoss(label_smoothing=0.1)
    inputs, target = data[0][0], data[1][0]

    def head_gradient(criterion):
        logits = model(inputs)
        return torch.autograd.grad(criterion(logits, target), model[2].bias)[0]

    with regrad.attach(model, optimizer, [PowerGrad()], plain) as attachment:
        assert not torch.equal(head_gradient(attachment.criterion), head_gradient(plain))
        assert torch.equal(
            attachment.criterion(model(inputs), target), plain(model(inputs), target)
        )
        model.eval()
        assert torch.equal(head_gradient(attachment.criterion), head_gradient(plain))
        model.train()
    assert torch.equal(head_gradient(attachment.criterion), head_gradient(plain))


def test_the_meter_sees_the_effect_and_that_alpha_one_has_none(make, data):
    changes = {}
    for alpha in (0.25, 1.0):
        model, optimizer = make()
        with regrad.attach(
            model, optimizer, [PowerGrad(alpha=alpha)], nn.CrossEntropyLoss()
        ) as attachment:
            train(model, optimizer, attachment.criterion, data)
            changes[alpha] = attachment.metrics()["powergrad/criterion/relative_change"]
    assert changes[0.25] > 0.01
    assert changes[1.0] == 0


def test_without_a_criterion_or_with_another_attaching_is_refused(make):
    with pytest.raises(regrad.RegradError, match="'powergrad' corrects the criterion"):
        regrad.attach(*make(), ["powergrad"])
    with pytest.raises(TypeError, match=r"criterion must be nn\.CrossEntropyLoss"):
        regrad.attach(*make(), ["powergrad"], nn.MSELoss())


def test_the_use_shown_in_the_card_runs(make, data):
    card = (Path(__file__).parents[1] / "README.md").read_text()
    (use,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    model, optimizer = make()
    names = {
        "regrad": regrad,
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "loader": zip(*data, strict=True),
    }
    exec(use, names)
    assert names["attachment"].metrics()["steps_applied"] == 4
    assert names["attachment"].metrics()["powergrad/criterion/relative_change"] > 0
    names["attachment"].detach()
