"""What the runs of a folder say to the statistics."""

from dataclasses import replace

from regrad_runner.reporting.summaries import steps_of_runs, summarize_results
from regrad_runner.results.outcomes import CurvePoint, Result
from regrad_runner.workloads.workload import Measure

LOSS = Measure(name="loss", higher_is_better=False)


def curve(arm, values, *, first_step):
    steps = range(first_step, first_step + 10 * len(values), 10)
    return [
        CurvePoint(arm=arm, seed=0, step=step, epoch=None, loss=None, value=value, lr=None)
        for step, value in zip(steps, values, strict=True)
    ]


def test_an_evaluation_before_the_first_step_is_no_step_of_training():
    results = [Result(arm=arm, seed=0, value=0.1) for arm in ("baseline", "xgrad")]
    slow, fast = [0.9, 0.5, 0.4, 0.3, 0.2], [0.9, 0.3, 0.2, 0.2, 0.1]
    points = curve("baseline", slow, first_step=0) + curve("xgrad", fast, first_step=0)
    found = steps_of_runs(results, points, LOSS)
    assert found.target == 0.3
    assert found.steps == {("baseline", 0): 40, ("xgrad", 0): 30}


def test_a_run_that_misses_is_as_long_as_its_curve_whatever_the_curve_counts():
    results, points = [], []
    for seed in range(6):
        for arm, values in (("baseline", [0.9, 0.5, 0.4, 0.3]), ("xgrad", [0.9, 0.9, 0.9, 0.9])):
            results.append(Result(arm=arm, seed=seed, value=values[-1], steps=1000))
            whole = curve(arm, values, first_step=10)
            points += [replace(point, seed=seed) for point in whole]
    found = {summary.arm: summary for summary in summarize_results(results, LOSS, curves=points)}
    # It ran 40 of the curve's steps, and the baseline took 40 to its own end.
    assert found["xgrad"].steps_interval == (1.0, None)


def test_the_ratio_of_learning_rates_is_that_of_the_chosen_ones():
    rates = {"baseline": 0.006, "xgrad": 0.012, "none-known": 0.0}
    results = [Result(arm=arm, seed=0, value=0.1, lr=lr) for arm, lr in rates.items()]
    found = {summary.arm: summary.rate_ratio for summary in summarize_results(results, LOSS)}
    assert found == {"baseline": 1.0, "xgrad": 2.0, "none-known": None}
    without = [replace(result, lr=0.0) for result in results]
    assert {summary.rate_ratio for summary in summarize_results(without, LOSS)} == {None}
