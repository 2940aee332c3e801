"""Under DDP and FSDP2 on two gloo processes each rank draws its own rows, and the mean is unbiased."""

import functools
import math

import pytest
import regrad
import torch
from regrad_activations import WTACRS, UniformRows
from regrad_testing.layout_clauses import ddp, fsdp2
from regrad_testing.loops import whole
from regrad_testing.processes import launch
from torch import nn

DRAWS = 300
KINDS = {"uniform-rows": UniformRows, "wta-crs": WTACRS}
WRAPS = {"ddp": ddp, "fsdp2": fsdp2}


def make_model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 80, 6, generator=generator, dtype=torch.float64)


def gradient_of(model, rank, world):
    """Return the whole weight gradient of the mean over ranks of sums over rows."""
    inputs, wanted = (part.chunk(world)[rank] for part in batch())
    model.zero_grad()
    (model(inputs) * wanted).sum().backward()
    weight = next(p for name, p in model.named_parameters() if name.endswith("0.weight"))
    return whole(weight.grad).clone()


def measured(kind, wrap, rank):
    """Return the mean error over draws, and its bound of 4 σ; and the state at the end."""
    inputs, wanted = batch()
    exact = wanted.T @ inputs / 2
    model = WRAPS[wrap](make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = regrad.attach(model, optimizer, [KINDS[kind]()])
    errors = []
    for _ in range(DRAWS):
        errors.append(gradient_of(model, rank, 2) - exact)
        optimizer.step()
    found = torch.stack(errors)
    variance = found.square().sum(dim=(1, 2)).mean().item()
    return {
        "error": found.mean(dim=0).norm().item(),
        "bound": 4 * math.sqrt(variance / DRAWS),
        "variance": variance,
        "state": attachment.state_dict()["corrections"][kind],
    }


class OnTwoProcesses:
    """What both processes run, in one start."""

    @classmethod
    def cases(cls):
        return {
            f"{kind} {wrap}": functools.partial(of_rank, kind, wrap)
            for kind in KINDS
            for wrap in WRAPS
        }


def of_rank(kind, wrap, rank):
    found = measured(kind, wrap, rank)
    return {"mean": found.pop("error"), **found}


@pytest.mark.long
def test_the_mean_over_draws_is_the_exact_gradient_and_both_ranks_have_one_state(reference):
    told = [
        (wanted.tolist(), inputs.tolist())
        for inputs, wanted in zip(*(part.chunk(2) for part in batch()), strict=True)
    ]
    # The mean of two independent ranks, of 40 rows each, 12 of them kept.
    by_formula = sum(reference.variance_of_uniform(*rank, 12) for rank in told) / 4
    for seen in launch(OnTwoProcesses):
        for case, found in seen.items():
            assert "error" not in found, found
            assert found["mean"] < found["bound"], case
            assert found["state"] == {"draws": DRAWS}, case
            if case.startswith("uniform"):
                assert found["variance"] == pytest.approx(by_formula, rel=0.15), case
