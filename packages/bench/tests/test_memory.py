import pytest
import torch
from regrad_bench.memory import highest, launches, peak_bytes

CPU = torch.device("cpu")


def test_the_highest_running_sum_by_hand():
    assert highest([]) == 0
    assert highest([8, -8, 4, 4, 4, -12]) == 12


def test_the_peak_is_what_was_held_at_once_and_not_what_was_allocated():
    def call():
        first, second = torch.empty(1_000_000), torch.empty(500_000)
        del first
        return second, torch.empty(250_000)

    assert peak_bytes(call, CPU) == 6_000_000


def test_what_was_there_before_does_not_count():
    there = torch.zeros(1_000_000)
    assert peak_bytes(lambda: there.add_(1), CPU) < 1000
    assert (
        4_000_000 <= peak_bytes(lambda: there + 1, CPU) < 4_001_000
    )  # with the number 1 as a tensor


def test_the_peak_of_a_device_of_any_type_is_that_of_its_own_allocator(monkeypatch):
    device, told = torch.device("xpu", 0), []
    numbers = {"memory_allocated": 100, "max_memory_allocated": 350}

    def note(name):
        def call(on):
            told.append((name, on))
            return numbers.get(name)

        return call

    names = ("synchronize", "reset_peak_memory_stats", *numbers)
    for name in names:
        monkeypatch.setattr(torch.accelerator, name, note(name))
    assert peak_bytes(lambda: told.append("call"), device) == 250
    before = [(name, device) for name in names[:3]]
    after = [(name, device) for name in (names[0], names[3])]
    assert told == [*before, "call", *after]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_peak_and_launches():
    there = torch.zeros(1_000_000, device="cuda")
    assert peak_bytes(lambda: there + 1, there.device) >= 4_000_000
    assert launches(lambda: there.add_(1).mul_(2)) == 2


def test_memory_from_an_earlier_measurement_does_not_count():
    kept = {"block": torch.zeros(1000)}

    def replace_the_block():
        del kept["block"]
        kept["block"] = torch.zeros(10)
        kept["block"] = torch.zeros(1000)

    peaks = [peak_bytes(replace_the_block, CPU) for _ in range(3)]
    assert peaks == [4040] * 3
