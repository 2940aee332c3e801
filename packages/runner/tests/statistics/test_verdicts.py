import itertools
import math

import numpy as np
import pytest
import torch
from regrad_runner.models.building import build_model
from regrad_runner.statistics.paired import holm, paired_difference, sign_flip_p
from regrad_runner.statistics.rows import RunRow
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.workloads.loading import load_workload
from regrad_runner.workloads.samples import training_loader
from scipy import stats

FINDINGS = ("better", "worse", "better than nothing")
NOISE = (0.31, -1.2, 0.64, 0.05, -0.48, 1.13, -0.02, 0.77, -0.9, 0.2)


def rows_of(arm, values, *, steps=None, touched=True, failed=(), diverged=()):
    return [
        RunRow(
            arm=arm,
            seed=seed,
            value=value,
            steps_to_target=steps[seed] if steps else None,
            step_seconds=1.0,
            touched=touched,
            status="failed" if seed in failed else "diverged" if seed in diverged else "finished",
        )
        for seed, value in enumerate(values)
    ]


def shifted(by, *, noise=0.01):
    return [value + by + noise * wobble for value, wobble in zip(NOISE, NOISE[::-1], strict=True)]


def summary_of(arm, rows, **options):
    return {summary.arm: summary for summary in summarize(rows, **options)}[arm]


def simulated_share_of_findings(tables, controls, *, seed):
    arms = ["baseline", *controls, *filter(None, controls.values())]
    values = np.random.default_rng(seed).normal(size=(tables, len(arms), 10))
    found = 0
    for table in values:
        rows = [
            row
            for arm, column in zip(arms, table.tolist(), strict=True)
            for row in rows_of(arm, column)
        ]
        found += any(summary.verdict in FINDINGS for summary in summarize(rows, controls=controls))
    return found / tables


@pytest.mark.long
@pytest.mark.parametrize(
    "controls",
    [{"a": None}, {"a": "nesterov", "b": "scaled head", "a+b": "both"}],
    ids=["one arm", "default arms"],
)
def test_identical_arms_get_a_verdict_in_about_five_of_a_hundred_tables(controls):
    assert 0.03 <= simulated_share_of_findings(2000, controls, seed=0) <= 0.07


@pytest.mark.long
def test_a_shift_of_one_and_a_half_deviations_is_found_with_ten_seeds():
    generator = np.random.default_rng(1)
    found = 0
    for baseline, noise in generator.normal(size=(1000, 2, 10)):
        rows = rows_of("baseline", baseline.tolist()) + rows_of(
            "a", (baseline + noise + 1.5).tolist()
        )
        found += summary_of("a", rows, controls={"a": None}).verdict == "better"
    assert found / 1000 >= 0.85


@pytest.mark.long
def test_a_shifted_arm_among_three_is_still_found():
    generator = np.random.default_rng(2)
    found = 0
    for baseline, *noises in generator.normal(size=(1000, 4, 10)):
        rows = rows_of("baseline", baseline.tolist()) + rows_of(
            "a", (baseline + noises[0] + 1.5).tolist()
        )
        rows += rows_of("b", (baseline + noises[1]).tolist()) + rows_of(
            "c", (baseline + noises[2]).tolist()
        )
        found += (
            summary_of("a", rows, controls={"a": None, "b": None, "c": None}).verdict == "better"
        )
    assert found / 1000 >= 0.85


def test_difference_interval_and_p_value_are_those_of_a_paired_t_test():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(0.2, noise=0.3))
    summary = summary_of("a", rows, controls={})
    expected = stats.ttest_rel(shifted(0.2, noise=0.3), NOISE)
    interval = expected.confidence_interval(0.95)
    assert summary.difference == pytest.approx(np.mean(shifted(0.2, noise=0.3)) - np.mean(NOISE))
    assert summary.p_value == pytest.approx(expected.pvalue)
    assert summary.interval == pytest.approx((interval.low, interval.high))


def test_difference_agrees_with_numbers_worked_out_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, error 1/sqrt(3), t quantile 4.302653 for 2 degrees.
    pairs = list(
        zip(rows_of("a", [1.0, 2.0, 3.0]), rows_of("baseline", [0.0, 0.0, 0.0]), strict=True)
    )
    test = paired_difference(pairs)
    assert test.difference == pytest.approx(2)
    assert test.interval == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6
    )
    assert test.p_value == pytest.approx(0.0741799, rel=1e-5)


def test_baseline_and_controls_are_named_as_such():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(1)) + rows_of("nesterov", shifted(0))
    verdicts = [summary.verdict for summary in summarize(rows, controls={"a": "nesterov"})]
    assert verdicts == ["baseline", "better", "control"]


def test_a_control_as_good_as_the_arm_forbids_better():
    rows = (
        rows_of("baseline", NOISE)
        + rows_of("a", shifted(1))
        + rows_of("nesterov", shifted(1, noise=-0.01))
    )
    summary = summary_of("a", rows, controls={"a": "nesterov"})
    assert summary.verdict == "better than nothing"
    assert summary.control == "nesterov"
    assert summary.against_control.pairs == 10
    assert summary.against_control.p_value > 0.05


def test_a_control_that_beats_the_arm_forbids_better():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(1)) + rows_of("nesterov", shifted(2))
    assert summary_of("a", rows, controls={"a": "nesterov"}).verdict == "better than nothing"


def test_a_control_that_was_not_run_forbids_better():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(1))
    for controls in ({"a": "nesterov"}, {}):
        summary = summary_of("a", rows, controls=controls)
        assert summary.verdict == "better than nothing"
        assert summary.against_control is None


def test_a_control_with_too_few_seeds_forbids_better():
    rows = (
        rows_of("baseline", NOISE) + rows_of("a", shifted(1)) + rows_of("nesterov", shifted(0)[:5])
    )
    assert summary_of("a", rows, controls={"a": "nesterov"}).verdict == "better than nothing"


def test_an_arm_for_which_no_control_exists_may_be_better():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(1))
    assert summary_of("a", rows, controls={"a": None}).verdict == "better"


def test_a_clear_loss_is_worse_whatever_the_control_did():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(-1)) + rows_of("nesterov", shifted(-2))
    assert summary_of("a", rows, controls={"a": "nesterov"}).verdict == "worse"


def test_a_measure_to_be_small_turns_the_verdict_around():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(-1)) + rows_of("b", shifted(1))
    summaries = summarize(rows, controls={"a": None, "b": None}, higher_is_better=False)
    assert [summary.verdict for summary in summaries] == ["baseline", "better", "worse"]
    assert summaries[1].difference < 0


def test_five_seeds_are_too_few_and_six_are_enough():
    for seeds, verdict in ((5, "too few seeds"), (6, "better")):
        rows = rows_of("baseline", NOISE[:seeds]) + rows_of("a", shifted(1)[:seeds])
        summary = summary_of("a", rows, controls={"a": None})
        assert (summary.pairs, summary.verdict) == (seeds, verdict)


def test_one_seed_gives_a_difference_without_an_interval():
    rows = rows_of("baseline", [0.5]) + rows_of("a", [0.75])
    summary = summary_of("a", rows, controls={})
    assert (summary.difference, summary.interval, summary.p_value, summary.sd) == (
        0.25,
        None,
        None,
        None,
    )
    assert summary.verdict == "too few seeds"


def test_only_seeds_that_both_arms_finished_are_compared():
    rows = rows_of("baseline", NOISE) + rows_of("a", shifted(1))[3:]
    summary = summary_of("a", rows, controls={"a": None})
    assert (summary.seeds, summary.pairs) == (7, 7)
    assert summary.difference == pytest.approx(np.mean(np.subtract(shifted(1), NOISE)[3:]))


def test_failed_runs_and_runs_without_a_number_are_counted_and_left_out():
    values = shifted(1)
    values[4] = math.nan
    values[0] = 1e9
    rows = rows_of("baseline", NOISE, failed=(1,)) + rows_of("a", values, failed=(0,))
    baseline, summary = summarize(rows, controls={"a": None})
    assert (baseline.seeds, baseline.failed, summary.seeds, summary.failed, summary.pairs) == (
        9,
        1,
        8,
        2,
        7,
    )
    assert summary.difference == pytest.approx(1, abs=0.05)


def test_a_run_that_diverged_is_worse_than_any_number():
    # Differences: +.1 in five seeds, which share rank 3, and minus infinity in one, which has rank 6.
    rows = rows_of("baseline", [0.0] * 6) + rows_of("a", [0.1] * 6, diverged=(2,))
    summary = summary_of("a", rows, controls={"a": None})
    assert summary.p_value == pytest.approx(brute_force([3, 3, 3, 3, 3, -6]))
    assert (
        summary.seeds,
        summary.failed,
        summary.diverged,
        summary.pairs,
        summary.diverged_pairs,
    ) == (5, 0, 1, 6, 1)
    assert summary.difference == pytest.approx(0.1)  # of the seeds with two numbers
    assert summary.verdict == "no evidence"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_an_arm_that_survives_where_the_baseline_diverges_is_better_though_its_numbers_are_not(
    higher_is_better,
):
    by = -0.1 if higher_is_better else 0.1
    baseline = rows_of("baseline", [0.0] * 10, diverged=range(8))
    summary, mirrored = (
        summary_of(
            arm, rows, controls={arm: None}, baseline=other, higher_is_better=higher_is_better
        )
        for arm, other, rows in (
            ("a", "baseline", baseline + rows_of("a", [by] * 10)),
            ("baseline", "a", baseline + rows_of("a", [by] * 10)),
        )
    )
    assert summary.difference == pytest.approx(by)
    assert (summary.pairs, summary.diverged_pairs, summary.verdict) == (10, 8, "better")
    assert (mirrored.diverged, mirrored.verdict) == (8, "worse")


def test_pairs_of_runs_that_both_diverged_say_nothing():
    rows = rows_of("baseline", NOISE, diverged=(0, 1)) + rows_of("a", shifted(1), diverged=(0, 1))
    summary = summary_of("a", rows, controls={"a": None})
    assert (summary.pairs, summary.diverged_pairs, summary.diverged) == (8, 0, 2)
    assert summary.p_value == pytest.approx(stats.ttest_rel(shifted(1)[2:], NOISE[2:]).pvalue)


def test_an_arm_whose_every_run_diverged_is_worse_without_a_number():
    rows = rows_of("baseline", NOISE) + rows_of("a", NOISE, diverged=range(10))
    summary = summary_of("a", rows, controls={})
    assert (summary.mean, summary.difference, summary.interval) == (None, None, None)
    assert (summary.pairs, summary.p_value, summary.verdict) == (10, 2 / 2**10, "worse")


def test_a_control_that_survives_as_well_forbids_better():
    rows = (
        rows_of("baseline", NOISE, diverged=range(10))
        + rows_of("a", NOISE)
        + rows_of("nesterov", NOISE)
    )
    assert summary_of("a", rows, controls={"a": "nesterov"}).verdict == "better than nothing"
    rows = rows_of("baseline", NOISE, diverged=range(10)) + rows_of("a", NOISE)
    rows += rows_of("nesterov", NOISE, diverged=range(10))
    assert summary_of("a", rows, controls={"a": "nesterov"}).verdict == "better"


@pytest.mark.long
def test_identical_arms_that_diverge_by_chance_get_a_verdict_in_about_five_of_a_hundred_tables():
    generator, found = np.random.default_rng(5), 0
    for table, diverges in zip(
        generator.normal(size=(2000, 2, 10)), generator.random((2000, 2, 10)), strict=True
    ):
        rows = [
            row
            for arm, column, lost in zip(("baseline", "a"), table.tolist(), diverges, strict=True)
            for row in rows_of(arm, column, diverged=np.flatnonzero(lost < 0.2))
        ]
        found += summary_of("a", rows, controls={"a": None}).verdict in FINDINGS
    assert found / 2000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_an_arm_whose_every_run_failed_has_no_numbers():
    rows = rows_of("baseline", NOISE) + rows_of("a", NOISE, failed=range(10))
    summary = summary_of("a", rows, controls={})
    assert (summary.seeds, summary.failed, summary.mean, summary.difference) == (0, 10, None, None)
    assert summary.verdict == "too few seeds"


def test_an_untouched_arm_is_inert_however_different_its_numbers():
    rows = rows_of("baseline", NOISE, touched=False) + rows_of("a", shifted(1), touched=False)
    assert summary_of("a", rows, controls={"a": None}).verdict == "inert"


def test_equal_runs_have_probability_one_and_no_width():
    summary = summary_of("a", rows_of("baseline", NOISE) + rows_of("a", NOISE), controls={})
    assert (summary.difference, summary.interval, summary.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert summary.verdict == "no evidence"


def test_a_constant_difference_is_judged_by_its_signs():
    # In binary these differences vary by rounding alone; six equal signs have probability 2 / 2^6.
    baseline = [0.9, 0.91, 0.92, 0.93, 0.94, 0.95]
    rows = rows_of("baseline", baseline) + rows_of("a", [value + 0.01 for value in baseline])
    summary = summary_of("a", rows, controls={"a": None})
    assert summary.p_value == 1 / 32
    assert summary.verdict == "better"


def test_holm_agrees_with_numbers_worked_out_by_hand():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, and never smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_takes_correction_arms_alone():
    rows = [
        row
        for name in ("baseline", "a", "b", "nesterov")
        for row in rows_of(name, shifted(0.1 * len(name), noise=0.3))
    ]
    summaries = {summary.arm: summary for summary in summarize(rows, controls={"a": "nesterov"})}
    adjusted = holm([summaries["a"].p_value, summaries["b"].p_value])
    assert [summaries["a"].p_adjusted, summaries["b"].p_adjusted] == adjusted
    assert summaries["nesterov"].p_adjusted is None
    assert summaries["baseline"].p_value is None


def brute_force(log_ratios):
    """Enumerate every sign, as the definition says."""
    values = [value for value in log_ratios if value != 0]
    ranks = stats.rankdata(np.abs(values))
    seen = abs(np.sum(ranks * np.sign(values)))
    sums = [abs(np.dot(ranks, signs)) for signs in itertools.product((-1, 1), repeat=len(values))]
    return np.mean([total >= seen - 1e-9 for total in sums])


@pytest.mark.parametrize(
    "log_ratios",
    [
        [0.1, -0.2, 0.3, 0.4, -0.05, 0.7, 0.0],
        [0.2, 0.2, -0.2, 0.2, 0.1, -0.1, 0.3, 0.3, 0.3, -0.1],
        [math.inf, math.inf, -0.3, 0.1, -math.inf, 0.2, 0.2],
    ],
    ids=["distinct", "ties", "misses"],
)
def test_sign_flip_test_agrees_with_enumeration(log_ratios):
    assert sign_flip_p(log_ratios) == pytest.approx(brute_force(log_ratios))


def test_sign_flip_test_agrees_with_scipy_on_the_signed_ranks():
    log_ratios = np.array([0.11, -0.25, 0.32, 0.41, -0.07, 0.73, 0.2])
    ranks = np.sign(log_ratios) * stats.rankdata(np.abs(log_ratios))
    expected = stats.permutation_test(
        (ranks,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(log_ratios.tolist()) == pytest.approx(expected.pvalue)


def test_sign_flip_test_is_exact_for_a_hundred_pairs():
    assert sign_flip_p([-float(i) for i in range(1, 101)]) == pytest.approx(2.0**-99)


def test_sign_flip_test_without_a_difference_says_one():
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([]) == 1.0


def test_a_miss_ranks_behind_every_hit():
    hits = [100] * 6
    late = rows_of("baseline", [0.0] * 6, steps=hits) + rows_of(
        "a", [0.0] * 6, steps=[99, 99, 99, 99, 99, 10_000]
    )
    missed = rows_of("baseline", [0.0] * 6, steps=hits) + rows_of(
        "a", [0.0] * 6, steps=[99, 99, 99, 99, 99, None]
    )
    one, other = (summary_of("a", rows, controls={}) for rows in (late, missed))
    assert one.steps_p == other.steps_p == pytest.approx(brute_force([-1, -1, -1, -1, -1, 2]))
    assert (one.misses, other.misses) == (0, 1)
    assert one.steps_ratio == other.steps_ratio == pytest.approx(0.99)
    assert (other.steps_to_target, other.seeds) == (99, 6)


def test_two_misses_of_a_pair_are_a_tie():
    steps = [90, 90, 90, 90, 90, None]
    rows = rows_of("baseline", [0.0] * 6, steps=[100, 100, 100, 100, 100, None]) + rows_of(
        "a", [0.0] * 6, steps=steps
    )
    assert summary_of("a", rows, controls={}).steps_p == 2 / 2**5


def test_medians_that_fall_on_a_miss_are_left_out():
    rows = rows_of("baseline", [0.0] * 4, steps=[100, None, None, None])
    rows += rows_of("a", [0.0] * 4, steps=[None, None, 50, 50])
    baseline, summary = summarize(rows, controls={})
    assert (baseline.steps_to_target, baseline.misses) == (None, 3)
    assert (summary.steps_to_target, summary.misses, summary.steps_ratio) == (None, 2, None)


def test_arms_keep_the_order_of_the_rows():
    rows = [row for arm in ("b", "baseline", "a") for row in rows_of(arm, [0.0])]
    assert [summary.arm for summary in summarize(rows, controls={})] == ["b", "baseline", "a"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (rows_of("a", [0.0]), {}, "baseline must be one of a, got 'baseline'"),
        ([], {}, r"baseline must be one of the arms \(there are none\), got 'baseline'"),
        (
            rows_of("baseline", [0.0]) * 2,
            {},
            "rows must hold each run once, got arm 'baseline' with seed 0 twice",
        ),
        (rows_of("baseline", [0.0]), {"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
    ],
)
def test_unfit_rows_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        summarize(rows, controls={}, **options)


def accuracy_after_training(workload, seed):
    model = build_model("resnet8", classes=10, channels=1, image_size=8, width=4, seed=seed)
    loader = training_loader(workload.train, batch_size=32, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [
            (model(images).argmax(1) == labels).sum().item()
            for images, labels in workload.test.batches()
        ]
    return sum(right) / len(workload.test)


def test_two_real_sets_of_baseline_runs_show_no_evidence():
    workload = load_workload("digits", train_size=320)
    rows = [
        row
        for arm, first_seed in (("baseline", 0), ("the same again", 100))
        for row in rows_of(
            arm, [accuracy_after_training(workload, first_seed + run) for run in range(8)]
        )
    ]
    summary = summary_of("the same again", rows, controls={"the same again": None})
    assert summary.verdict == "no evidence"
    assert summary.sd > 0
