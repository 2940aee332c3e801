"""A plugin published for regrad 0.1, as it was, against this core: what it imports, declares and does must go on."""

from pathlib import Path

import pytest
import regrad
import torch

FOLDER = Path(__file__).parent / "plugin_of_0_1"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def losses(spec, steps, state=None, kept=None):
    """Return the losses of some steps of y = Wx, and the attachment; go on from `state` and weights where given."""
    model = torch.nn.Linear(2, 2, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    optimizer = regrad.load("descent", "regrad.optimizers")(
        model.parameters(), lr=0.1, momentum=0.9
    )
    if kept:
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
    attachment = regrad.attach(
        model, optimizer, [spec] if spec else [], torch.nn.functional.mse_loss
    )
    if state:
        attachment.load_state_dict(state)
    inputs, target = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = attachment.criterion(model(inputs), target)
        seen.append(loss.item())
        loss.backward()
        optimizer.step()
    return seen, attachment


def by_hand(steps, factor=2.0, distance=0.5, limit=1.0, extra=0.1, lr=0.1):
    """Repeat the plugin's rule on the same problem without regrad."""
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    momentum, last, seen = None, torch.zeros_like(weight), []
    for _ in range(steps):
        point = weight + distance * last
        error = factor * point.T - 1
        seen.append((error**2).mean().item())
        gradient = (2 * factor * error / 4).T.clone()
        if gradient.norm() > limit:
            gradient *= 0.5
        if momentum is not None:
            momentum = momentum + extra * lr * momentum.norm()
        momentum = gradient if momentum is None else 0.9 * momentum + gradient
        last = -lr * momentum
        weight = weight + last
    return seen


def test_every_stage_does_what_it_did():
    seen, attachment = losses("both:push.extra=0.1", 6)
    torch.testing.assert_close(seen, by_hand(6), rtol=1e-12, atol=0)
    assert attachment.metrics()["push/halved"] > 0
    receipt = attachment.receipt()
    assert [(c["name"], c["distribution"], c["version"]) for c in receipt["corrections"]] == [
        ("sharpen", "regrad-of-0-1", "0.1.0"),
        ("push", "regrad-of-0-1", "0.1.0"),
    ]
    assert "'push' goes 0.5" in receipt["notes"]


def test_its_state_goes_on():
    whole, _ = losses("both:push.extra=0.1", 6)
    first, attachment = losses("both:push.extra=0.1", 3)
    kept = attachment.model.state_dict(), attachment.optimizer.state_dict()
    second, _ = losses("both:push.extra=0.1", 3, attachment.state_dict(), kept)
    assert first + second == whole


def test_its_refusals_and_errors_are_still_raised():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="distance must be at least 0, got -1"):
        regrad.create("push:distance=-1")
    with pytest.raises(regrad.RegradError, match="'push' needs momentum"):
        regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), ["push"])
