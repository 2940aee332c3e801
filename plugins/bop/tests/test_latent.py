"""Bop is SGD on latent weights: "latent weights do not exist" names the same numbers anew."""

import pytest
import torch
from regrad_bop import Bop

COUNT = 1000
STEPS = 400
RATE = 0.01


def problem():
    """A start, and gradients that depend on the weights: a coupled quadratic, and noise."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    directions = torch.randn(COUNT, 20, generator=generator, dtype=torch.float64)
    goal = torch.randn(20, generator=generator, dtype=torch.float64)

    def gradient(weights):
        noise = torch.randn(COUNT, generator=generator, dtype=torch.float64)
        return directions @ (directions.T @ weights / COUNT - goal) + noise

    return torch.where(start >= 0, 1.0, -1.0).double(), gradient


def bop_weights(threshold):
    """Yield signs and moments of Bop after every step."""
    start, gradient = problem()
    weight = torch.nn.Parameter(start.clone())
    groups = [{"params": [weight], "binary": True}]
    optimizer = Bop(groups, lr=RATE, threshold=threshold)
    for _ in range(STEPS):
        weight.grad = gradient(weight.detach())
        optimizer.step()
        yield weight.detach().clone(), optimizer.state[weight]["moment"].clone()


def latent_weights(threshold):
    """Yield signs and latent weights of torch's SGD with decay 1 after every step.

    The estimator is the identity: the gradient at the signs is that of the latent weights. Within
    the threshold around 0 the sign is kept.
    """
    signs, gradient = problem()
    latent = torch.nn.Parameter(torch.zeros(COUNT, dtype=torch.float64))
    optimizer = torch.optim.SGD([latent], lr=RATE, weight_decay=1.0)
    for _ in range(STEPS):
        latent.grad = gradient(signs)
        optimizer.step()
        signs = torch.where(latent.detach().abs() > threshold, latent.detach().sign(), signs)
        yield signs, latent.detach().clone()


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_bop_is_the_sign_of_latent_sgd_with_decay_one(threshold):
    flips = 0
    last = None
    pairs = zip(bop_weights(threshold), latent_weights(threshold), strict=True)
    for (ours, moment), (theirs, latent) in pairs:
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(moment, -latent, rtol=0, atol=1e-14)
        flips += 0 if last is None else int((ours != last).sum())
        last = ours
    assert flips > 50  # the comparison is not one of weights that stand still
