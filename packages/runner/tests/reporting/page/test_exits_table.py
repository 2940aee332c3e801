"""Models with several exits on the page: two figures and a table."""

from dataclasses import replace

import pytest
from regrad_runner.diagnostics.exits import AS_PREDICTED, BY_SUMS, ExitOutcome
from regrad_runner.reporting.figures.exits import exit_curves, outcomes_by_series
from regrad_runner.reporting.page.exits_table import exits_table
from regrad_runner.reporting.page.write import write_page
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.run import begin_run
from regrad_runner.statistics.verdicts import summarize
from regrad_runner.workloads.workload import Measure

# By arm and way of judging: the accuracy at exits 1 and 2 and for the budget, of seeds 0, 1, 2.
ACCURACIES = {
    ("baseline", AS_PREDICTED): {"exit 1": 0.25, "exit 2": 0.5, "budget 1": 0.375},
    ("baseline", BY_SUMS): {"exit 1": 0.25, "exit 2": 0.4375, "budget 1": 0.375},
    ("boosted", AS_PREDICTED): {"exit 1": 0.25, "exit 2": 0.625, "budget 1": 0.4375},
    ("boosted", BY_SUMS): {"exit 1": 0.25, "exit 2": 0.625, "budget 1": 0.4375},
}
COSTS = {"exit 1": 1e6, "exit 2": 3e6, "budget 1": 2e6}
# What a seed adds; the pairs of boosted and baseline differ by it too.
SEED_EFFECTS = {"baseline": (0.0, 0.0, 0.0), "boosted": (-0.03125, 0.0, 0.03125)}


def outcomes():
    return [
        ExitOutcome(
            arm=arm,
            seed=seed,
            step=80,
            answer=answer,
            judged=judged,
            accuracy=accuracy + SEED_EFFECTS[arm][seed],
            multiply_adds=COSTS[answer] + 1000 * seed * answer.startswith("budget"),
        )
        for (arm, judged), by_answer in ACCURACIES.items()
        for seed in range(3)
        for answer, accuracy in by_answer.items()
    ]


@pytest.fixture
def data(tmp_path):
    results = [
        Result(arm=arm, seed=seed, lr=0.1, value=0.5, step_seconds=0.01, steps=80)
        for arm in ("baseline", "boosted")
        for seed in range(3)
    ]
    for result in results:
        name = f"{result.arm}, seed {result.seed}"
        values = {"name": name, "arm": result.arm, "seed": result.seed, "lr": result.lr}
        with begin_run(tmp_path, values) as record:
            record.end("finished", result=numbers_of(result))
    measure = Measure()
    return ReportData(
        folder=ResultsFolder(tmp_path),
        measure=measure,
        summaries=summarize(
            [result.as_run_row() for result in results], controls={"boosted": None}
        ),
        effects=[],
        qualities=[],
        about={},
        settings={},
        receipts={},
        exits=outcomes(),
    )


def test_running_sums_are_a_line_of_their_own_where_they_answer_otherwise(data):
    assert list(outcomes_by_series(data)) == ["baseline", "baseline, running sums", "boosted"]


def test_figures_have_a_point_per_exit_or_budget_at_its_mean_cost(data):
    budgets, exits = exit_curves(data)
    assert (budgets.name, exits.name) == ("budgets", "exits")
    places = [(mark.x, mark.y, mark.seeds) for mark in exits.marks_of("boosted")]
    assert places == [(1.0, 0.25, 3), (3.0, 0.625, 3)]
    (budget,) = budgets.marks_of("boosted")
    assert (budget.x, budget.y) == (pytest.approx(2.001), 0.4375)
    assert (budget.low, budget.high) == (0.4375 - 0.015625, 0.4375 + 0.015625)
    assert exits.styles["baseline, running sums"].control


def test_the_table_compares_the_last_exit_and_budgets_with_the_baseline_by_seed(data):
    table = exits_table(data)
    texts = [[cell.text for cell in row] for row in table.rows]
    # Differences -.03125, 0 and +.03125 about the mean: sd .03125, t(2) 4.3027, half width .0776.
    assert texts == [
        ["baseline", "exit 2", "0.5000 ± 0.0000", "3,000,000", "–"],
        ["baseline", "budget 1", "0.3750 ± 0.0000", "2,001,000", "–"],
        [
            "baseline, running sums",
            "exit 2",
            "0.4375 ± 0.0000",
            "3,000,000",
            "−0.0625 [−0.0625, −0.0625]",
        ],
        [
            "baseline, running sums",
            "budget 1",
            "0.3750 ± 0.0000",
            "2,001,000",
            "+0.0000 [+0.0000, +0.0000]",
        ],
        [
            "boosted",
            "exit 2",
            "0.6250 ± 0.0312",
            "3,000,000",
            "+0.1250 [+0.0474, +0.2026]",
        ],
        [
            "boosted",
            "budget 1",
            "0.4375 ± 0.0312",
            "2,001,000",
            "+0.0625 [−0.0151, +0.1401]",
        ],
    ]


def test_a_run_of_one_arm_alone_is_no_pair(data):
    fewer = replace(data, exits=[row for row in data.exits if row.arm == "boosted"])
    assert {row[-1].text for row in exits_table(fewer).rows} == {"–"}


def test_the_page_shows_both_figures_and_the_table(data):
    files = write_page(data)
    page = files[0].read_text()
    assert '<section id="exits"' in page
    assert "baseline, running sums" in page
    assert {"budgets.svg", "exits.svg"} <= {file.name for file in files}


def test_without_exits_there_is_no_section(data):
    plain = replace(data, exits=[])
    assert exit_curves(plain) == []
    assert exits_table(plain) is None
    assert '<section id="exits"' not in write_page(plain)[0].read_text()
