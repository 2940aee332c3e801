import pytest
from regrad_runner.reporting.resolution import FEW_SAMPLES, resolution_in_words, resolution_of
from regrad_runner.workloads.workload import Measure

BITS = Measure(name="test bits per byte", higher_is_better=False)


def about_of(validation, test):
    sizes = {"train": 5000, "validation": validation, "test": test}
    return {"samples": "images", "sizes": sizes}


def test_one_sample_of_an_accuracy_is_worth_its_share():
    found = resolution_of(about_of(1000, 2000), Measure())
    assert (found.one_validation_sample, found.one_test_sample) == (1 / 1000, 1 / 2000)
    assert found.warning == ""
    assert resolution_in_words(found, Measure()) == (
        "validation: 1,000 images, one is worth .0010; test: 2,000 images, one is worth .0005"
    )


def test_one_sample_of_another_measure_has_no_worth():
    found = resolution_of(about_of(1000, 2000), BITS)
    assert (found.one_validation_sample, found.one_test_sample) == (None, None)
    assert resolution_in_words(found, BITS) == "validation: 1,000 images; test: 2,000 images"


@pytest.mark.parametrize("few", [1, FEW_SAMPLES - 1])
def test_few_samples_are_warned_of_by_split(few):
    enough = FEW_SAMPLES
    assert resolution_of(about_of(enough, enough), Measure()).warning == ""
    validation = resolution_of(about_of(few, enough), Measure()).warning
    assert validation == f"only {few} images for validation: learning rates are chosen by chance"
    test = resolution_of(about_of(enough, few), Measure()).warning
    assert test == f"only {few} images for test: the verdicts hold for these few"
    assert resolution_of(about_of(few, few), Measure()).warning == f"{validation}; {test}"


@pytest.mark.parametrize("about", [{}, {"sizes": None}, {"sizes": {}}, about_of(0, 0)])
def test_a_folder_that_does_not_say_has_no_resolution(about):
    assert resolution_of(about, Measure()) is None
