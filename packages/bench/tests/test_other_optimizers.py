"""Optimizers of other libraries that step in ways of their own: a correction acts rightly, or is refused."""

import pytest
import pytorch_optimizer
import regrad
import torch
from regrad import RegradError
from timm.optim import create_optimizer_v2
from torch import nn

BOUND = 0.01


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1, "momentum": 0.9, **options})


class ClippedSGD(torch.optim.SGD):
    """Clamps its gradients itself: the loop by hand."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-BOUND, BOUND)
        return super().step(closure)


def ascending(name):
    """Return what makes an optimizer that evaluates the model a second time, at weights of its own."""
    kind = getattr(pytorch_optimizer, name)

    def make(model, base=torch.optim.SGD):
        first = (model,) if name == "WSAM" else ()
        return kind(*first, model.parameters(), base, lr=0.1, momentum=0.9)

    return make


def wrapping(name):
    kind = getattr(pytorch_optimizer, name)
    return lambda model, base=torch.optim.SGD: kind(base(model.parameters(), lr=0.1, momentum=0.9))


def timm_lookahead(model):
    return create_optimizer_v2(model, "lookahead_sgd", lr=0.1)


ASCENDING = {n: ascending(n) for n in ("SAM", "WSAM", "LookSAM", "FriendlySAM")}
MOVING = {n: wrapping(n) for n in ("Lookahead", "TRAC", "Magma", "ScheduleFreeWrapper")}
MOVING["timm's Lookahead"] = timm_lookahead
MOVING["BSAM"] = lambda model: pytorch_optimizer.BSAM(model.parameters(), num_data=8)
PASSING = {n: wrapping(n) for n in ("Lookahead", "TRAC", "OrthoGrad")}


def train(make, corrections, *, with_closure, **options):
    """Return the weights after some steps, and what the corrections did."""
    model = network()
    optimizer = make(model, **options)
    generator = torch.Generator().manual_seed(1)
    with regrad.attach(model, optimizer, corrections) as attachment:
        for _ in range(8):
            inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, 2, (16,), generator=generator)

            def closure(inputs=inputs, labels=labels):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            optimizer.zero_grad()
            closure()
            optimizer.step(closure) if with_closure else optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()], attachment


@pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in (ASCENDING | MOVING).items()])
def test_a_correction_that_looks_ahead_is_refused_with_them(make):
    model = network()
    optimizer = make(model)
    with pytest.raises(RegradError, match="'xgrad'"):
        regrad.attach(model, optimizer, ["xgrad"])
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in ASCENDING.items()])
def test_the_gradient_that_the_optimizer_inside_uses_is_corrected_once(make):
    corrections = [f"clip-value:max_value={BOUND}"]
    ours, attachment = train(make, corrections, with_closure=True)
    by_hand, _ = train(make, [], with_closure=True, base=ClippedSGD)
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert attachment.metrics()["steps_applied"] == 8


@pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in PASSING.items()])
def test_a_gradient_is_corrected_before_the_wrapped_optimizer_steps(make):
    corrections = [f"clip-value:max_value={BOUND}"]
    ours, attachment = train(make, corrections, with_closure=False)
    by_hand, _ = train(make, [], with_closure=False, base=ClippedSGD)
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert attachment.metrics()["steps_applied"] == 8
