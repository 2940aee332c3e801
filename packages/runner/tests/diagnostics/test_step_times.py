import math
import time

import pytest
from regrad_runner.diagnostics import step_times
from regrad_runner.diagnostics.step_times import (
    FEWEST_PAIRS,
    TIMED_PAIRS,
    StepTime,
    keep_step_times,
    kept_step_times,
    measure_step_times,
    why_not_measured,
)
from regrad_runner.settings.arms import BASELINE, Arm
from regrad_runner.settings.config import CompareConfig
from regrad_runner.training.preparation import load_data
from regrad_runner.training.run import TrainingRun


@pytest.fixture(autouse=True)
def without_limit(monkeypatch):
    """Let no busy machine shorten a measurement."""
    monkeypatch.setattr(step_times, "LONGEST_SECONDS", math.inf)


@pytest.fixture(scope="module")
def loaded():
    settings = CompareConfig(
        workload="digits", model="resnet8", width=4, train_size=96, batch_size=32, epochs=1
    )
    workload, config = load_data(settings)
    return config, workload


def measured(loaded):
    config, workload = loaded
    return measure_step_times(config, workload, (Arm(BASELINE), 0.1), (Arm("a"), 0.1))


def test_a_short_run_is_made_long_enough_for_thirty_pairs(loaded):
    found = measured(loaded)
    assert found.pairs == TIMED_PAIRS
    assert found.seconds > 0
    assert found.baseline_seconds > 0
    low, high = found.interval
    assert low <= found.ratio <= high


def test_the_steps_take_turns_and_every_second_pair_begins_with_the_baseline(loaded, monkeypatch):
    order = []
    train = TrainingRun._micro_batch

    def watched(run, inputs, targets):
        order.append(run.arm.name)
        train(run, inputs, targets)

    monkeypatch.setattr(TrainingRun, "_micro_batch", watched)
    measured(loaded)
    timed = order[-2 * TIMED_PAIRS :]
    assert timed[:4] == ["a", BASELINE, BASELINE, "a"]
    assert timed.count("a") == timed.count(BASELINE) == TIMED_PAIRS


def test_the_ratio_is_the_median_over_pairs_of_what_the_clock_says(loaded, monkeypatch):
    elapsed = [0.0]
    train = TrainingRun._micro_batch

    def slow(run, inputs, targets):
        train(run, inputs, targets)
        elapsed[0] += 3.0 if run.arm.name == "a" else 2.0

    monkeypatch.setattr(TrainingRun, "_micro_batch", slow)
    monkeypatch.setattr(step_times, "clock_of", lambda run: lambda: elapsed[0])
    found = measured(loaded)
    assert (found.ratio, found.interval) == (1.5, (1.5, 1.5))
    assert (found.seconds, found.baseline_seconds) == (3.0, 2.0)


def test_slow_steps_are_measured_fewer_times(loaded, monkeypatch):
    monkeypatch.setattr(step_times, "LONGEST_SECONDS", 0.0)
    assert measured(loaded).pairs == FEWEST_PAIRS


def test_the_effect_meter_does_not_look(loaded, monkeypatch):
    runs = []
    build = step_times._quiet_run

    def keep(*arguments):
        runs.append(build(*arguments))
        return runs[-1]

    monkeypatch.setattr(step_times, "_quiet_run", keep)
    config, workload = loaded
    measure_step_times(config, workload, (Arm(BASELINE), 0.1), (Arm("agc", ("agc",)), 0.1))
    assert [run.attachment.engine.meter.sums for run in runs] == [{}, {}]


def test_what_was_measured_is_read_back(tmp_path):
    times = {
        "agc": StepTime(
            ratio=1.02, interval=(1.0, 1.1), pairs=30, seconds=0.1, baseline_seconds=0.09
        ),
        "slow": StepTime(ratio=3.0, interval=None, pairs=3, seconds=0.3, baseline_seconds=0.1),
    }
    keep_step_times(tmp_path, times)
    assert kept_step_times(tmp_path) == times


def test_a_folder_without_the_measurement_has_no_times(tmp_path):
    assert kept_step_times(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"agc": {"ratio": "1"}}', '{"agc": 1}', "\udcff", "[" * 100_000]
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "step_times.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="must hold times per step as compare wrote them") as found:
        kept_step_times(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"job_array": True}, "jobs of an array"),
        ({"processes": 2}, "several processes"),
        ({}, "they were not measured"),
    ],
)
def test_the_reason_for_no_times_is_known(about, words):
    assert words in why_not_measured(about)


@pytest.mark.parametrize(
    ("threads", "workers", "clock"),
    [(1, 0, time.thread_time), (2, 0, time.perf_counter), (1, 1, time.perf_counter)],
)
def test_only_on_one_thread_alone_time_is_what_the_thread_used(
    loaded, monkeypatch, threads, workers, clock
):
    config, workload = loaded
    run = TrainingRun(config, workload, Arm(BASELINE), seed=0, lr=0.1)
    run.close()
    run.config = config.model_copy(update={"workers": workers})
    monkeypatch.setattr(step_times.torch, "get_num_threads", lambda: threads)
    assert step_times.clock_of(run) is clock
