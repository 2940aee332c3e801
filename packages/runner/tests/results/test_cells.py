import pytest
from regrad_runner.results.cells import Cell, Extension, cells_of, in_ranges, is_compared
from regrad_runner.settings.config import FIRST_TUNING_SEED, CompareConfig


def test_trials_come_first_arm_by_arm_then_extensions_round_by_round_and_runs_seed_by_seed():
    config = CompareConfig(seeds=2, lr=[0.1, 0.2], tuning_seeds=1, tuning_extensions=2)
    assert cells_of(["baseline", "agc"], config) == [
        Cell("baseline", FIRST_TUNING_SEED, 0.1),
        Cell("baseline", FIRST_TUNING_SEED, 0.2),
        Cell("agc", FIRST_TUNING_SEED, 0.1),
        Cell("agc", FIRST_TUNING_SEED, 0.2),
        Extension("baseline", FIRST_TUNING_SEED, 1),
        Extension("agc", FIRST_TUNING_SEED, 1),
        Extension("baseline", FIRST_TUNING_SEED, 2),
        Extension("agc", FIRST_TUNING_SEED, 2),
        Cell("baseline", 0),
        Cell("agc", 0),
        Cell("baseline", 1),
        Cell("agc", 1),
    ]


def test_seeds_that_are_added_leave_every_number_as_it_was():
    few, many = (
        cells_of(["baseline", "agc"], CompareConfig(seeds=seeds, lr=[0.1, 0.2])) for seeds in (2, 5)
    )
    assert many[: len(few)] == few


def test_one_rate_needs_no_trials():
    assert all(map(is_compared, cells_of(["baseline"], CompareConfig(seeds=3, lr=[0.1]))))


def test_a_cell_has_a_name_and_a_folder_of_its_own():
    cells = cells_of(
        ["agc:max_ratio=.1", "agc max_ratio=.1", "../agc"],
        CompareConfig(seeds=2, lr=[0.1, 0.2], tuning_extensions=0),
    )
    assert (
        len({cell.folder_names for cell in cells})
        == len({cell.name for cell in cells})
        == len(cells)
    )
    assert not any("/" in name or name == ".." for cell in cells for name in cell.folder_names)
    assert Cell("agc", FIRST_TUNING_SEED + 1, 0.1).name == "agc, lr 0.1, trial 2"
    assert Cell("agc", 3).name == "agc, seed 3"
    assert Extension("agc", FIRST_TUNING_SEED + 1, 3).name == "agc, extension 3, trial 2"


@pytest.mark.parametrize(
    ("numbers", "written"), [([], ""), ([4], "4"), ([0, 1, 3, 5, 6, 7], "0-1,3,5-7")]
)
def test_numbers_are_written_as_a_job_array_takes_them(numbers, written):
    assert in_ranges(numbers) == written
