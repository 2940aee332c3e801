import gc
import time

import pytest
import torch
from regrad_bench.timing import DeviceClock, HostClock, Paired, WallClock, clock_for, interleave


class Ticks:
    """A time that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *seconds, log=None, name=""):
        """Return a call that takes these seconds, one after the other, then the last for ever."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if log is not None:
                log.append(name)

        return call


def test_seconds_are_what_the_clock_says_passed_during_the_call():
    ticks = Ticks()
    assert HostClock(ticks).seconds(ticks.taking(2.5)) == 2.5


def test_pairs_alternate_and_every_second_begins_with_the_peer():
    ticks, log = Ticks(), []
    ours, peer = (ticks.taking(1.0, log=log, name=name) for name in ("ours", "peer"))
    interleave(ours, peer, pairs=3, clock=HostClock(ticks), warm_up=1)
    assert log == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]


def test_the_times_of_the_warm_up_and_of_the_preparation_are_left_out():
    ticks = Ticks()
    timed = interleave(
        ticks.taking(100.0, 3.0),
        ticks.taking(100.0, 2.0),
        pairs=4,
        clock=HostClock(ticks),
        prepare=ticks.taking(50.0),
        warm_up=1,
    )
    assert timed == Paired((3.0,) * 4, (2.0,) * 4)
    assert timed.ratio == 1.5


def test_everything_is_prepared_before_every_call():
    ticks, log = Ticks(), []
    side = ticks.taking(1.0, log=log, name="side")
    prepare = ticks.taking(1.0, log=log, name="prepare")
    interleave(side, side, pairs=2, clock=HostClock(ticks), prepare=prepare, warm_up=1)
    assert log == ["prepare", "side"] * 6


def test_repeats_are_counted_as_one_call_each():
    ticks = Ticks()
    timed = interleave(
        ticks.taking(2.0), ticks.taking(1.0), pairs=1, clock=HostClock(ticks), repeats=10
    )
    assert timed == Paired((2.0,), (1.0,))


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_sides():
    timed = Paired((1.0, 20.0, 3.0), (1.0, 10.0, 6.0))
    assert timed.ratios == [1.0, 2.0, 0.5]
    assert timed.ratio == 1.0
    assert timed.medians == (3.0, 6.0)
    assert timed.quartiles == (0.75, 1.5)


def test_a_machine_that_slows_down_slows_both_sides():
    ticks = Ticks()
    slower = [1.0, 1.0, 2.0, 4.0, 8.0]
    ours, peer = ticks.taking(*(3 * s for s in slower)), ticks.taking(*slower)
    assert interleave(ours, peer, pairs=4, clock=HostClock(ticks), warm_up=1).quartiles == (
        3.0,
        3.0,
    )


def test_one_pair_has_its_ratio_as_quartiles():
    assert Paired((3.0,), (2.0,)).quartiles == (1.5, 1.5)


def test_the_garbage_collector_rests_during_timed_calls_and_goes_on_after_a_failure():
    seen = []
    interleave(
        lambda: seen.append(gc.isenabled()), lambda: None, pairs=1, clock=HostClock(), warm_up=0
    )
    assert seen == [False]

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        interleave(fail, fail, pairs=1, clock=HostClock(), warm_up=0)
    assert gc.isenabled()


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"pairs": 1, "repeats": 0}])
def test_nothing_to_time_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be at least 1, got 0"):
        interleave(lambda: None, lambda: None, clock=HostClock(), **wrong)


def test_one_thread_is_timed_by_what_the_process_used_and_waiting_by_what_passed():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert clock_for(torch.device("cpu")).seconds(lambda: time.sleep(0.2)) < 0.1
        assert WallClock().seconds(lambda: time.sleep(0.2)) >= 0.2
        torch.set_num_threads(2)
        assert clock_for(torch.device("cpu")).seconds(lambda: time.sleep(0.2)) >= 0.2
    finally:
        torch.set_num_threads(before)


def test_a_device_of_any_type_is_timed_by_its_own_events(monkeypatch):
    device, told = torch.device("xpu", 0), []

    class Event:
        """Notes what is asked of it."""

        def __init__(self, on, *, enable_timing):
            told.append(("event", on, enable_timing))

        def record(self):
            told.append("record")

        def elapsed_time(self, end):
            return 2500.0

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda on: told.append(("wait", on)))
    assert clock_for(device).seconds(lambda: told.append("call")) == 2.5
    made, waits = ("event", device, True), ("wait", device)
    assert told == [made, made, waits, "record", "call", "record", waits]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_clock_counts_the_work_and_not_only_its_launch():
    big = torch.randn(4096, 4096, device="cuda")
    clock = clock_for(big.device)
    assert isinstance(clock, DeviceClock)
    clock.seconds(lambda: big @ big)
    assert clock.seconds(lambda: [big @ big for _ in range(20)]) > 5 * clock.seconds(
        lambda: big @ big
    )
