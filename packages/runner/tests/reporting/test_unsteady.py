import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from regrad_runner.reporting.unsteady import in_words, lower_rates, next_lower
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.verdicts import ArmSummary


def folder_of(path, rates):
    results = [Result(arm=arm, seed=0, lr=lr) for arm, lr in rates.items()]
    trials = [
        Trial(arm=arm, lr=lr, seed=1_000_000, validation=0.5)
        for arm in rates
        for lr in (0.003, 0.006, 0.012)
    ]
    return SimpleNamespace(path=Path(path), results=results, trials=trials)


def summary_of(arm, *, unsteady):
    return ArmSummary(arm=arm, seeds=6, failed=0, mean=1.0, sd=0.1, unsteady=unsteady)


def test_only_an_unsteady_arm_has_an_offer_with_a_command_for_a_shell():
    folder = folder_of("my runs", {BASELINE: 0.012, "agc": 0.006})
    arms = [summary_of(BASELINE, unsteady=True), summary_of("agc", unsteady=False)]
    (offer,) = lower_rates(folder, arms)
    assert (offer.arm, offer.lr, offer.next_lr) == (BASELINE, 0.012, 0.006)
    words = shlex.split(offer.command)
    assert words[:2] == ["regrad", "compare"]
    assert words[2:] == [
        *("--config", "my runs/config.yaml"),
        *("--lr", "0.006"),
        *("--out", "my runs-lr-0.006"),
    ]
    assert in_words(offer).endswith(f"compare at the next lower one: {offer.command}")


@pytest.mark.parametrize(
    ("lr", "tried", "lower"),
    [
        (0.012, [0.003, 0.006, 0.012], 0.006),
        (0.003, [0.003, 0.006, 0.012], 0.0015),
        (0.1, [0.1], 0.05),
        (0.1, [], 0.05),
        (0.1, [0.1, 0.3], 0.0333333),
    ],
)
def test_the_next_lower_rate_is_of_the_grid_or_continues_it(lr, tried, lower):
    assert next_lower(lr, tried) == lower
