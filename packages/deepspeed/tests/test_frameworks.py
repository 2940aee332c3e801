"""Accelerate and the Hugging Face Trainer with DeepSpeed inside, on two gloo processes."""

import importlib.util

import pytest
from regrad_testing import load_beside, run_on_processes

TOLERANCE = 1e-6  # sums over processes are taken in another order
PATIENCE = 500.0  # seconds: importing DeepSpeed takes some on a busy machine

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; `nox -s deepspeed` installs it",
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cases():
    """Return what the processes run; the libraries are heavy, and only these tests need them."""
    return load_beside(__file__, "cases_frameworks")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerate_trains_and_resumes_as_one_process(cases, stage, tmp_path):
    seen = run_on_processes(cases.accelerated, stage, str(tmp_path), patience=PATIENCE)
    for found in seen:
        assert found["processes"] == 2
        assert found["layout"] == f"zero-{stage}"
        assert found["far"] <= TOLERANCE
        assert found["same"]


@pytest.fixture(scope="module")
def without_deepspeed(cases, tmp_path_factory):
    """Return what the same Trainer ends with under DDP."""
    folder = str(tmp_path_factory.mktemp("ddp"))
    return run_on_processes(cases.trained_by_the_trainer, 0, folder, patience=PATIENCE)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_trains_and_resumes_as_without_deepspeed(
    cases, without_deepspeed, stage, tmp_path
):
    seen = run_on_processes(cases.trained_by_the_trainer, stage, str(tmp_path), patience=PATIENCE)
    for found, wanted in zip(seen, without_deepspeed, strict=True):
        assert found["layout"] == f"zero-{stage}"
        assert found["steps"] == found["resumed"] == wanted["steps"] == 6
        assert found["same"]
        assert found["logged"]
        for name, values in wanted["weights"].items():
            assert found["weights"][name] == pytest.approx(values, abs=TOLERANCE), name
