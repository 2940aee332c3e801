"""Seeds that a script sets are moved once, on every device."""

import random
import types

import numpy as np
import pytest
import torch
from regrad_runner.scripts import seeding


@pytest.fixture
def told(monkeypatch):
    """What the modules of two types of device are told, one of them a fake; all is undone."""
    seen = []
    npu = types.ModuleType("torch.npu")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    for kind, module in (("npu", npu), ("cuda", torch.cuda)):
        for name in ("manual_seed", "manual_seed_all"):

            def note(seed, kind=kind, name=name):
                seen.append((kind, name, seed))

            monkeypatch.setattr(module, name, note, raising=False)
    for module in seeding._device_modules():
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    for owner, names in (
        (torch, ("manual_seed", "Generator")),
        (torch.random, ("manual_seed",)),
        (np.random, ("seed", "default_rng")),
        (random, ("seed",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    return seen


def test_the_seed_of_any_device_is_moved(told):
    seeding.shift_seeds(2)
    torch.npu.manual_seed_all(5)
    torch.npu.manual_seed(seed=6)
    torch.cuda.manual_seed(7)
    assert told == [
        ("npu", "manual_seed_all", 2005),
        ("npu", "manual_seed", 2006),
        ("cuda", "manual_seed", 2007),
    ]


def test_a_seed_that_torch_hands_on_to_its_devices_is_moved_once(told):
    state = torch.get_rng_state()
    try:
        seeding.shift_seeds(1)
        torch.manual_seed(5)
        assert torch.initial_seed() == 1005
        assert ("cuda", "manual_seed_all", 1005) in told
        torch.manual_seed(6)
        assert torch.initial_seed() == 1006
    finally:
        torch.set_rng_state(state)


def test_no_shift_changes_nothing(told):
    before = torch.manual_seed, torch.npu.manual_seed
    seeding.shift_seeds(0)
    assert (torch.manual_seed, torch.npu.manual_seed) == before
