import io
import json
import re
from dataclasses import replace

import pytest
from regrad_runner.reporting.sentences import sentence
from regrad_runner.reporting.table import comparison_table, print_comparison, to_json
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.workloads.workload import Measure
from rich.console import Console

MEASURE = Measure(target=0.96)
NOISE = (0.001, -0.002, 0.003, 0.0, -0.001, 0.002, -0.003, 0.001, 0.0, 0.002)
WOBBLE = (0.0, 0.001, 0.002, -0.001, 0.001, 0.0, -0.001, 0.001, -0.002, 0.001)


def rows_of(arm, shift=0.0, *, wobble=WOBBLE, touched=True, failed=(), steps=100, seeds=10):
    return [
        RunRow(
            arm=arm,
            seed=seed,
            value=0.98 + NOISE[seed] + shift + wobble[seed],
            steps_to_target=None if steps is None else steps + seed,
            step_seconds=0.002,
            touched=touched,
            status="failed" if seed in failed else "finished",
        )
        for seed in range(seeds)
    ]


BASELINE = rows_of("baseline", wobble=[0.0] * 10)
CONTROLS = {"xgrad": "nesterov", "powergrad": "scaled-head", "agc:axis=[0,1]": None, "slow": None}


@pytest.fixture(scope="module")
def summaries():
    rows = [
        *BASELINE,
        *rows_of("xgrad", 0.008, steps=80),
        *rows_of("powergrad", 0.008, wobble=WOBBLE[::-1]),
        *rows_of("agc:axis=[0,1]", wobble=[0.0] * 10, touched=False),
        *rows_of("slow", -0.02, failed=(3,), steps=None),
        *rows_of("nesterov", 0.001, wobble=WOBBLE[::-1]),
        *rows_of("scaled-head", 0.008),
    ]
    return summarize(rows, controls=CONTROLS, target=MEASURE.target)


def sentence_about(arm, summaries, measure=MEASURE):
    return next(sentence(summary, measure) for summary in summaries if summary.arm == arm)


def printed(summaries, *, width=100, terminal=False, measure=MEASURE):
    file = io.StringIO()
    print_comparison(Console(file=file, width=width, force_terminal=terminal), summaries, measure)
    return file.getvalue()


def test_the_table_fits_a_hundred_columns_with_every_name_and_number_whole(summaries):
    file = io.StringIO()
    Console(file=file, width=100, no_color=True).print(comparison_table(summaries, MEASURE))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    for summary in summaries:
        row = next(line for line in lines if line.startswith(f"{summary.arm} "))
        assert f".{round(10000 * summary.mean):04d} ± .{round(10000 * summary.sd):04d}" in row
    assert "…" not in file.getvalue()


def test_where_lower_is_better_the_table_says_so_and_a_fall_is_better():
    measure = Measure(name="test bits per byte", higher_is_better=False, decimals=2)
    rows = [*BASELINE, *rows_of("agc", -0.2), *rows_of("slow", 0.2)]
    falling = summarize(
        rows, controls={"agc": None, "slow": None}, higher_is_better=measure.higher_is_better
    )
    said = printed(falling, measure=measure)
    assert "lower is better" in said
    assert (
        "agc: better than the baseline (-.20 [-.20, -.20], p < .001 after Holm, 10 seeds)" in said
    )
    assert (
        "slow: worse than the baseline (+.20 [+.20, +.20], p < .001 after Holm, 10 seeds)" in said
    )
    assert "lower is better" not in printed(falling)


def test_piped_output_has_one_unbroken_line_per_arm_and_no_escapes(summaries):
    text = printed(summaries, width=40)
    assert "\x1b" not in text
    assert "…" not in text
    assert (
        sum(
            line.startswith("xgrad ") and line.rstrip().endswith("better")
            for line in text.splitlines()
        )
        == 1
    )
    for summary in summaries:
        assert sentence(summary, MEASURE) in text.splitlines()


def test_a_narrow_terminal_breaks_lines_and_leaves_nothing_out(summaries):
    text = printed(summaries, width=70, terminal=True)
    assert "…" not in text
    assert "[+.0" in text


def test_eighty_columns_break_no_number_and_names_where_their_parts_meet():
    arms = ["centralization", "xgrad:horizon=2.0,decoupled_decay=0.01+powergrad:alpha=0.5", "slow"]
    rows = [
        *BASELINE,
        *(row for arm in arms for row in rows_of(arm, -0.02, failed=(1,), steps=None)),
    ]
    file = io.StringIO()
    summaries = summarize(rows, controls=dict.fromkeys(arms), target=MEASURE.target)
    Console(file=file, width=80, no_color=True).print(
        comparison_table(summaries, MEASURE, narrow=True)
    )
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (first,) = [line for line in lines if line.startswith("centralization ")]
    summary = summaries[1]
    mean, sd, low, high = (
        f".{round(10000 * abs(x)):04d}" for x in (summary.mean, summary.sd, *summary.interval)
    )
    assert first.split()[:6] == ["centralization", mean, "±", sd, "–", "(9)"]
    assert lines[lines.index(first) + 1].split() == ["not", f"[-{low},", f"-{high}]"]
    assert lines[lines.index(first) + 2].strip() == "resolved"
    place = next(number for number, line in enumerate(lines) if line.startswith("xgrad:"))
    broken = ["xgrad:", "horizon=2.0,", "decoupled_deca", "y=0.01", "+powergrad:", "alpha=0.5"]
    assert [line[:14].strip() for line in lines[place : place + 6]] == broken


def test_a_control_that_is_a_correction_of_its_own_has_its_verdict():
    rows = [*BASELINE, *rows_of("agc", 0.02), *rows_of("clip-norm", 0.008, wobble=WOBBLE[::-1])]
    verdicts = {
        s.arm: s.verdict for s in summarize(rows, controls={"agc": "clip-norm", "clip-norm": None})
    }
    assert verdicts == {"baseline": "baseline", "agc": "better", "clip-norm": "better"}


def test_a_console_keeps_its_width(summaries):
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    print_comparison(console, summaries, MEASURE)
    assert console.width == 40


def test_brackets_in_names_are_no_markup(summaries):
    assert "agc:axis=[0,1]" in printed(summaries)


def test_cells_hold_what_was_measured(summaries):
    lines = printed(summaries).splitlines()
    baseline = next(line for line in lines if line.startswith("baseline "))
    assert re.split(" {2,}", baseline.rstrip()) == [
        "baseline",
        ".9803 ± .0019",
        "1.00×",
        "1.00×",
        "baseline",
    ]
    slow = next(line for line in lines if line.startswith("slow "))
    assert "– (9)" in slow  # no median, nine misses
    assert "9/9" in slow
    assert slow.rstrip().endswith("worse")


def test_without_a_target_there_is_no_word_of_steps(summaries):
    uncounted = [replace(summary, target=None) for summary in summaries]
    text = printed(uncounted, measure=Measure(target=None))
    assert "steps" not in text
    assert "better" in text


def test_the_steps_are_a_ratio_with_its_misses_and_its_interval_below(summaries):
    lines = printed(summaries).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("xgrad "))
    assert " 0.81× " in lines[place]
    assert lines[place + 1].split() == ["[0.80,", "0.81]"]
    from_baseline = [replace(summary, target=0.98125) for summary in summaries]
    assert "baseline .9812" in printed(from_baseline, measure=Measure())
    text = sentence_about("xgrad", from_baseline, Measure())
    assert "times the baseline's steps to reach the baseline's end, .9812 (p = .002" in text


def test_an_unsteady_arm_is_called_so_in_table_sentence_and_json():
    wide = [replace(row, value=row.value + 0.04 * (-1) ** row.seed) for row in rows_of("agc")]
    summaries = summarize([*BASELINE, *wide, *rows_of("xgrad")], controls={"agc": None})
    assert [summary.unsteady for summary in summaries] == [False, True, False]
    text = printed(summaries)
    assert "no evidence, unsteady" in text
    assert re.search(
        r"agc: no evidence .*; unsteady: its runs spread 2\d\.\d times as much as those of baseline "
        r"\(p < \.001 if all arms spread alike\)\.",
        text,
    )
    assert "unsteady" not in sentence_about("baseline", summaries)
    (agc,) = [arm for arm in json.loads(to_json(summaries, MEASURE))["arms"] if arm["unsteady"]]
    assert (agc["arm"], agc["steadiest"], agc["verdict"]) == ("agc", "baseline", "no evidence")


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("baseline", ["the baseline, 10 seeds", "10 of 10 runs reached .96"]),
        (
            "xgrad",
            [
                "better than the baseline (+.0082 [",
                "10 seeds) and than its control nesterov (",
                "takes 0.81 [0.80, 0.81] times the baseline's steps to reach .96 (p = .002",
            ],
        ),
        (
            "powergrad",
            [
                "better than the baseline (",
                "but not shown to be better than its control scaled-head (",
            ],
        ),
        ("agc:axis=[0,1]", ["changed nothing in 10 runs: it equals the baseline."]),
        (
            "slow",
            [
                "worse than the baseline (-.01",
                "0 of 9 runs reached .96",
                "1 run failed and is left out.",
            ],
        ),
        (
            "nesterov",
            [
                "a control; difference from the baseline +.00",
                "takes 1.00 [1.00, 1.00] times the baseline's steps to reach .96",
            ],
        ),
    ],
)
def test_each_verdict_has_a_sentence_that_says_why(summaries, arm, words):
    text = sentence_about(arm, summaries)
    assert text.startswith(f"{arm}: ")
    for part in words:
        assert part in text
    assert "\n" not in text


def test_a_control_that_was_not_run_is_named():
    rows = [*BASELINE, *rows_of("xgrad", 0.008)]
    assert "but its control nesterov was not run" in sentence_about(
        "xgrad", summarize(rows, controls=CONTROLS)
    )
    assert "but no control was run" in sentence_about("xgrad", summarize(rows, controls={}))
    text = sentence_about("xgrad", summarize(rows, controls={"xgrad": None}))
    assert "; it has no control to beat" in text


def test_an_arm_without_a_measured_effect_is_not_called_equal_where_its_numbers_differ():
    rows = [*BASELINE, *rows_of("clip-update", 0.008, touched=False)]
    text = sentence_about("clip-update", summarize(rows, controls={}))
    assert text.startswith(
        "clip-update: changed nothing in the measured steps of 10 runs; its diff"
    )
    assert "from the baseline, +.0082 [+.0073, +.0091], comes" in text
    assert text.endswith(" comes from rounding, or from steps between those.")


def test_no_evidence_says_so_with_its_numbers():
    rows = [*BASELINE, *rows_of("xgrad", 0.0)]
    text = sentence_about("xgrad", summarize(rows, controls={}))
    assert text.startswith(
        "xgrad: no evidence of a difference from the baseline (+.0002 [-.0007, +.0011], p = ."
    )


def test_few_seeds_are_counted():
    rows = [*BASELINE, *rows_of("xgrad", seeds=1)]
    text = sentence_about("xgrad", summarize(rows, controls={}))
    assert (
        text
        == "xgrad: too few seeds for a verdict: 1 shared with the baseline, at least 6 are needed."
    )


def test_a_sentence_says_who_diverged_and_what_the_verdict_then_rests_on():
    lost = [
        replace(row, status="diverged") if row.seed in (2, 5) else row
        for row in rows_of("xgrad", 0.008)
    ]
    text = sentence_about("xgrad", summarize([*BASELINE, *lost], controls={}))
    assert "no evidence of a difference from the baseline (+.008" in text
    assert "10 seeds, 2 of them with one diverged run: tested by ranks)" in text
    assert text.endswith("; 2 runs diverged and count as worse than any number.")
    lost = [replace(row, status="diverged") for row in rows_of("xgrad")]
    text = sentence_about("xgrad", summarize([*BASELINE, *lost], controls={}))
    assert (
        "worse than the baseline (no seed with both numbers, p = .002 after Holm, 10 seeds, "
        "10 of them with one diverged run: tested by ranks" in text
    )


def test_an_interval_that_excludes_nothing_is_called_not_resolved():
    missed = [replace(row, steps_to_target=None) for row in rows_of("agc")]
    summaries = summarize([*BASELINE, *missed], controls={"agc": None}, target=MEASURE.target)
    unresolved = [replace(summary, steps_ratio=1.0) for summary in summaries]
    unresolved = [replace(summary, steps_interval=(0.0, None)) for summary in unresolved]
    text = sentence_about("agc", unresolved)
    assert "steps to reach .96: not resolved, as too many runs of this arm or of the base" in text
    assert "∞" not in text + printed(unresolved)
    one_sided = [replace(summary, steps_interval=(0.0, 0.83)) for summary in unresolved]
    assert "takes 1.00 [≤ 0.83] times the baseline's steps" in sentence_about("agc", one_sided)


def test_another_learning_rate_than_the_baselines_is_said():
    summaries = summarize([*BASELINE, *rows_of("xgrad", 0.008)], controls={"xgrad": None})
    assert "rate" not in sentence_about("xgrad", summaries)
    at_twice = [replace(summary, rate_ratio=2.0) for summary in summaries]
    assert "; at twice the baseline's rate" in sentence_about("xgrad", at_twice)
    alike = [replace(summary, rate_ratio=1.0) for summary in summaries]
    assert "rate" not in sentence_about("xgrad", alike)


def test_a_control_whose_runs_all_failed_is_said_to_have_no_number():
    lost = rows_of("nesterov", failed=range(10))
    rows = [*BASELINE, *rows_of("xgrad", 0.008), *lost]
    summaries = summarize(rows, controls=CONTROLS, target=MEASURE.target)
    assert sentence_about("nesterov", summaries) == (
        "nesterov: a control without a run that ended with a number; 10 runs failed and are left "
        "out."
    )


def test_an_arm_without_a_finished_run_is_a_row_of_dashes():
    rows = [*BASELINE, *rows_of("xgrad", failed=range(10))]
    summaries = summarize(rows, controls={}, target=MEASURE.target)
    row = next(line for line in printed(summaries).splitlines() if line.startswith("xgrad "))
    assert row.split() == ["xgrad", "–", "–", "–", "0/0", "too", "few", "seeds"]
    assert "10 runs failed and are left out." in sentence_about("xgrad", summaries)


def test_json_holds_every_number_and_sentence(summaries):
    content = json.loads(to_json(summaries, MEASURE))
    wanted = {"name": "test accuracy", "higher_is_better": True, "target": 0.96, "decimals": 4}
    wanted["on_validation"] = None
    assert content["measure"] == wanted
    for arm, summary in zip(content["arms"], summaries, strict=True):
        assert arm["arm"] == summary.arm
        assert arm["mean"] == summary.mean
        assert arm["verdict"] == summary.verdict
        assert arm["sentence"] == sentence(summary, MEASURE)
    assert (
        content["arms"][1]["against_control"]["difference"]
        == summaries[1].against_control.difference
    )
    assert content["arms"][4]["steps_to_target"] is None
