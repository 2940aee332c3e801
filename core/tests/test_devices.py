"""Devices that are neither CPU nor CUDA, by a module that notes what is asked of it."""

import types

import pytest
import torch
from regrad import devices

NPU = torch.device("xpu", 1)  # any type that torch knows; its module is a fake


class Module:
    """What torch has for a type of device."""

    def __init__(self, *, takes_device=True):
        self.calls = []
        self.takes_device = takes_device
        self.captures = False

    def is_initialized(self):
        return True

    def is_current_stream_capturing(self):
        return self.captures

    def get_rng_state(self, *device):
        assert len(device) == self.takes_device
        self.calls.append(("get", *device))
        return torch.tensor([1, 2])

    def set_rng_state(self, state, *device):
        assert len(device) == self.takes_device
        self.calls.append(("set", state.tolist(), *device))


@pytest.fixture
def fake(monkeypatch):
    """Put a fake in the place of an accelerator."""

    def put(kind, **options):
        module = Module(**options)
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        return module

    devices._module_with_graphs.cache_clear()
    yield put
    devices._module_with_graphs.cache_clear()


def test_random_numbers_of_any_device_are_put_back(fake):
    module = fake("xpu")
    on_device = types.SimpleNamespace(device=NPU)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with devices.random_numbers_kept([on_device, torch.ones(1), on_device]):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)
    assert module.calls == [("get", NPU), ("set", [1, 2], NPU)]


def test_they_are_put_back_where_something_raises(fake):
    module = fake("mps", takes_device=False)
    on_device = types.SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(KeyError), devices.random_numbers_kept([on_device]):
        raise KeyError
    assert module.calls == [("get",), ("set", [1, 2])]


def test_the_accelerator_that_is_there_is_named(fake, monkeypatch):
    fake("xpu")
    assert devices.accelerator() == "xpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.accelerator() is None


def test_a_capture_is_noticed_on_any_device(fake, monkeypatch):
    module = fake("xpu")
    assert not devices.is_capturing()
    module.captures = True
    assert devices.is_capturing()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    devices._module_with_graphs.cache_clear()
    assert not devices.is_capturing()
    fake("xpu").captures = True
    devices._module_with_graphs.cache_clear()
    assert devices.is_capturing()
    monkeypatch.setattr(Module, "is_initialized", lambda self: False)
    assert not devices.is_capturing()
    assert not devices.is_in_use("xpu")
