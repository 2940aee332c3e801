import random

import numpy as np
import pytest
import torch
from regrad.errors import RegradError
from regrad_runner.checkpoints.states import (
    load_optimizer,
    optimizer_state,
    random_state,
    set_random_state,
)
from regrad_testing import load_beside, run_on_processes


def two_layers(*, swapped=False):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers = [list(layer.parameters()) for layer in model]
    groups = [{"params": layers[0], "lr": 0.1}, {"params": layers[1], "lr": 0.2}]
    return model, torch.optim.SGD(groups[::-1] if swapped else groups, momentum=0.9)


def test_optimizer_state_goes_by_name_whatever_the_order_of_the_groups():
    model, optimizer = two_layers()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer_state(model, optimizer)
    other_model, other = two_layers(swapped=True)
    load_optimizer(other_model, other, saved)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    for name, parameter in other_model.named_parameters():
        momentum = other.state[parameter]["momentum_buffer"]
        assert torch.equal(
            momentum, optimizer.state[dict(model.named_parameters())[name]]["momentum_buffer"]
        )


def test_an_optimizer_of_other_groups_is_refused():
    model, optimizer = two_layers()
    one_group = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        RegradError,
        match="optimizer must have the checkpoint's parameter groups, got different ones in group 0",
    ):
        load_optimizer(model, one_group, optimizer_state(model, optimizer))


def test_random_states_come_back():
    state = random_state()

    def draws():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),  # noqa: NPY002
            [random.random() for _ in range(3)],
        )

    first = draws()
    set_random_state(state)
    assert draws() == first


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)
def test_shards_are_gathered_and_cut_again_exactly_and_go_to_one_process_and_back():
    shards = load_beside(__file__, "shards")
    for seen in run_on_processes(shards.differences):
        exact = [value for name, value in seen.items() if ":exact:" in name]
        assert len(exact) >= 6
        assert all(value == 0 for value in exact), seen
        # float64: the mean of two half batches and of the whole round differently
        assert all(value < 1e-12 for value in seen.values()), seen


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1)]
)
def test_neither_saving_nor_loading_steps_the_optimizer(make):
    steps = []
    model, other = (torch.nn.Linear(2, 2) for _ in range(2))
    model.bias.requires_grad_(False)
    optimizer, fresh = make(model.parameters()), make(other.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for either in (optimizer, fresh):
        either.register_step_pre_hook(lambda *_: steps.append(1))
    load_optimizer(other, fresh, optimizer_state(model, optimizer))
    assert steps == []
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
