"""Which arms belong together, and which are so far off that they would hide the others."""

from regrad_runner.reporting.figures.families import families, far_off, in_families
from regrad_runner.statistics.verdicts import ArmSummary


def arm(name, verdict="no evidence", control=None, difference=None):
    interval = None if difference is None else (difference - 0.01, difference + 0.01)
    return ArmSummary(
        arm=name,
        seeds=6,
        failed=0,
        mean=1.0,
        sd=0.1,
        verdict=verdict,
        control=control,
        difference=difference,
        interval=interval,
    )


def test_a_control_follows_the_first_of_its_corrections_and_the_others_come_last():
    arms = [
        arm("baseline", "baseline"),
        arm("xgrad", control="nesterov"),
        arm("gcw", control="nesterov"),
        arm("agc", control="clip-norm"),
        arm("clip-norm"),  # a correction of its own, and a control
        arm("nesterov", "control"),
        arm("orphan", "control"),
    ]
    wanted = [["xgrad", "nesterov"], ["gcw"], ["agc"], ["clip-norm"], ["orphan"]]
    assert families(arms) == wanted
    assert in_families(arms) == [name for members in wanted for name in members]


def test_only_a_few_that_are_far_worse_are_off_the_axis():
    near = [arm(f"a{number}", difference=0.02 * number) for number in range(4)]
    assert far_off([*near, arm("lost", difference=-3.0)], higher_is_better=True) == {"lost"}
    assert far_off([*near, arm("best", difference=3.0)], higher_is_better=True) == frozenset()
    assert far_off([*near, arm("lost", difference=3.0)], higher_is_better=False) == {"lost"}
    assert far_off([near[0], arm("lost", difference=-3.0)], higher_is_better=True) == frozenset()
    assert far_off([], higher_is_better=True) == frozenset()
