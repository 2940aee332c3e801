import pytest
import torch
from regrad_runner.training import timing
from regrad_runner.training.timing import StepTimer

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns, in seconds."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_only_laps_after_the_metered_steps_count_for_the_time():
    timer = StepTimer()
    timer.laps = [(0, 9.0), (10, 8.0)]
    assert timer.step_seconds() == 8.5
    timer.laps += [(20, 1.0), (30, 2.0), (40, 4.0)]
    assert timer.step_seconds() == 2.0


def test_before_the_first_lap_ended_a_step_takes_no_time():
    assert StepTimer().step_seconds() == 0.0


def test_time_counts_between_resume_and_pause_alone(clock):
    timer = StepTimer()
    for seconds in (3.0, 5.0):
        timer.resume()
        clock.now += seconds
        timer.pause()
        clock.now += 100.0
    assert timer.lap_seconds == 8.0
    assert timer.end_lap(after_step=4, device=CPU) == 8.0
    assert timer.laps == [(0, 2.0)]
    assert timer.lap_seconds == 0.0


def test_a_lap_counts_the_steps_since_it_began(clock):
    timer = StepTimer()
    timer.begin_lap(after_step=30)
    timer.resume()
    clock.now += 6.0
    timer.pause()
    assert timer.end_lap(after_step=33, device=CPU) == 6.0
    assert timer.laps == [(30, 2.0)]
