"""What the runs of a folder say to the statistics."""

from regrad_runner.reporting.summaries import steps_of_runs
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
