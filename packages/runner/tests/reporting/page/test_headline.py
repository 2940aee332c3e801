"""The answer in one sentence."""

import pytest
from regrad_runner.reporting.page.headline import headline, rest
from regrad_runner.statistics.paired import PairedDifference
from regrad_runner.statistics.verdicts import ArmSummary

BASELINE = ArmSummary(arm="baseline", seeds=6, failed=0, mean=1.0, sd=0.1, verdict="baseline")
BEATEN = PairedDifference(pairs=6, difference=0.1, p_value=0.001, side=1)


def arm(name, verdict, *, control=None, beaten=False):
    return ArmSummary(
        arm=name,
        seeds=6,
        failed=0,
        mean=1.0,
        sd=0.1,
        pairs=6 if verdict != "too few seeds" else 3,
        control=control,
        against_control=BEATEN if beaten else None,
        verdict=verdict,
    )


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([], "Only the baseline was run: there is nothing to compare."),
        (
            [arm("xgrad", "better", control="nadam", beaten=True)],
            "xgrad is better than the baseline and than its control, nadam.",
        ),
        (
            [arm("xgrad", "better", beaten=True), arm("agc", "better", beaten=True)],
            "xgrad and agc are better than the baseline and than their controls.",
        ),
        (
            [arm("agc", "better")],
            "agc is better than the baseline (without a control to beat).",
        ),
        (
            [arm("agc", "better"), arm("xgrad", "better", beaten=True)],
            "agc and xgrad are better than the baseline and, where there is one, than their "
            "control.",
        ),
        (
            [arm("xgrad", "better than nothing", control="nadam")],
            "xgrad is better than the baseline, but not shown to be better than its control, "
            "nadam.",
        ),
        ([arm("agc", "worse")], "No correction is shown to be better than the baseline."),
        (
            [arm("agc", "too few seeds")],
            "Too few seeds for a verdict: 3 shared of at least 6.",
        ),
    ],
)
def test_the_headline_says_what_is_better_than_baseline_and_control(arms, said):
    assert headline([BASELINE, *arms]) == said


def test_the_second_sentence_leaves_no_correction_out_and_repeats_none():
    arms = [
        arm("a", "better", beaten=True),
        arm("b", "better than nothing", control="nadam"),
        arm("c", "worse"),
        arm("d", "no evidence"),
        arm("e", "inert"),
        arm("nadam", "control"),
    ]
    assert rest([BASELINE, *arms]) == (
        "b is better than the baseline, but not shown to be better than its control, nadam. c is "
        "worse than the baseline. No evidence of a difference: d. e changed no measured step."
    )
    assert rest([BASELINE, arm("b", "better than nothing")]) == ""


def test_of_many_names_the_first_are_told():
    arms = [arm(f"a{number}", "better", beaten=True) for number in range(6)]
    assert headline(arms).startswith("a0, a1, a2 and 3 more are better than the baseline")
