"""`regrad train` with DeepSpeed inside, on two gloo processes, against one without it."""

import functools
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from regrad_testing import load_beside, run_on_processes

TOLERANCE = 1e-6  # sums over processes are taken in another order
PATIENCE = 900.0  # seconds: DeepSpeed builds its communication at its first start
STAGES = (1, 2, 3)
TRAIN = [
    *("train", "--workload", "digits", "--train-size", "96", "--epochs", "2"),
    *("--batch-size", "32", "--width", "4", "--norm", "group", "--threads", "1"),
    *("--checkpoint-every", "3", "--clip-norm", "0.2", "--tracker", "none"),
]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; `nox -s deepspeed` installs it",
    ),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def cases():
    """Return what the processes run; the libraries are heavy, and only these tests need them."""
    return load_beside(__file__, "cases_runner")


@pytest.fixture(scope="module")
def alone(cases):
    """Return what one process without DeepSpeed ends with."""
    return cases.alone()


@pytest.fixture(scope="module")
def distances(cases, alone, tmp_path_factory):
    """Return how far from one process two of torch's DDP end, by case.

    AdamW divides what the order of sums changes by gradients that are nearly 0; how far that is
    depends on the processor.
    """
    folder = tmp_path_factory.mktemp("ddp")
    run_on_processes(cases.with_ddp, str(folder), patience=PATIENCE)
    weights = torch.load(folder / "out.pt", weights_only=True)
    return {case: farthest(weights[case], wanted["weights"]) for case, wanted in alone.items()}


@pytest.fixture(scope="module", params=STAGES)
def engine(request, cases, tmp_path_factory):
    """Return what two processes of a stage end with, and the stage."""
    folder = tmp_path_factory.mktemp(f"zero-{request.param}")
    run_on_processes(cases.with_engine, request.param, str(folder), patience=PATIENCE)
    return request.param, torch.load(folder / "out.pt", weights_only=True)


def farthest(one, other):
    """Return the largest difference of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_two_processes_end_as_one_without_deepspeed(alone, distances, engine):
    stage, seen = engine
    for case, wanted in alone.items():
        found = seen[case]
        assert found["layout"] == f"zero-{stage}"
        nearest = max(TOLERANCE, 2 * distances[case])
        assert farthest(found["weights"], wanted["weights"]) <= nearest <= 4 * TOLERANCE, case
        losses = pytest.approx(wanted["losses"], abs=TOLERANCE, nan_ok=case == "not finite")
        assert found["losses"] == losses, case
        assert found["values"] == wanted["values"], case
        assert found["applied"] == wanted["applied"], case
    # Other trainings, and so a test that would fail if nothing was clipped, corrected or skipped.
    for case in ("clipped", "corrected", "adamw"):
        assert farthest(alone[case]["weights"], alone["baseline"]["weights"]) > 100 * TOLERANCE


def test_the_runner_clips_before_the_corrections_and_deepspeed_does_not(cases, engine):
    _, seen = engine
    for case in cases.CASES:
        assert "DeepSpeed does not clip (gradient_clipping is 0)" in seen[case]["notes"]


def test_a_batch_that_is_no_number_on_one_process_is_left_out_by_all(alone, engine):
    _, seen = engine
    assert seen["not finite"]["skipped"] == alone["not finite"]["skipped"] == 1
    assert seen["not finite"]["applied"] == seen["corrected"]["applied"] - 1
    weights = seen["not finite"]["weights"].values()
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_norms_of_the_last_steps_are_those_of_whole_tensors(alone, engine):
    _, seen = engine
    for case, wanted in alone.items():
        assert seen[case]["norms"] == pytest.approx(wanted["norms"], abs=1e-5), case


def test_a_run_that_is_resumed_ends_with_the_bits_of_one_that_is_not(cases, engine):
    _, seen = engine
    for case in cases.CASES:
        assert seen[case]["same"], case
        assert seen[case]["same counts"], case
        assert len(seen[case]["files"]) >= 3, case  # one of the model, one of each process at least


def test_checkpoints_that_do_not_fit_are_refused_before_anything_has_changed(engine):
    _, seen = engine
    said = seen["refused"]
    assert (
        "checkpoint must be of the same corrections; 'agc' is missing here" in said["corrections"]
    )
    assert "settings of this run, got clip_norm 0.2 there and 0.1 here" in said["settings"]
    assert "act in the checkpoint's order (xgrad, powergrad, agc), got agc" in said["order"]
    for name in ("corrections", "order", "settings"):
        assert said[f"{name} unchanged"], name


# ---- the command


def launched(folder, *arguments, processes=2, stage=2, patience=PATIENCE, **more):
    """Return what `accelerate launch --use_deepspeed` of the command ends with."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--use_deepspeed", "--zero_stage", str(stage), "--num_processes", str(processes)),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(free_port()), "-m", "regrad_runner", *arguments),
    ]
    return finished(command, folder, patience, {"DS_ACCELERATOR": "cpu", **more})


def finished(command, folder, patience, more):
    """Run a command in a folder; return its exit code and what it said."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")
    }
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )


def free_port():
    """Return a port that nobody listens to."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def result_of(folder):
    """Return the result of a run's folder."""
    (run,) = (folder / "runs").glob("*/*/run.json")
    return json.loads(run.read_text())["result"]


def weights_in(folder):
    """Return the whole weights of the last checkpoint of an engine."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found = get_fp32_state_dict_from_zero_checkpoint(str(last), tag="engine")
    return {name: weight.detach() for name, weight in found.items()}


@functools.cache
def trained_alone(folder):
    """Return the weights and the result of the command on one process."""
    command = [sys.executable, "-m", "regrad_runner", *TRAIN, "--out", "alone"]
    done = finished(command, folder, PATIENCE, {})
    assert done.returncode == 0, done.stderr
    last = sorted((folder / "alone" / "checkpoints").glob("step-*"))[-1]
    tensors = torch.load(last / "tensors.pt", weights_only=True)
    return tensors["model"], result_of(folder / "alone")


def test_accelerate_launch_trains_is_stopped_and_goes_on(tmp_path):
    wanted, result = trained_alone(tmp_path)
    done = launched(tmp_path, *TRAIN, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert farthest(wanted, weights_in(tmp_path / "two")) <= TOLERANCE
    assert result_of(tmp_path / "two")["value"] == result["value"]
    last = sorted((tmp_path / "two" / "checkpoints").glob("step-*"))[-1]
    kept = weights_in(tmp_path / "two")
    shutil.rmtree(last)
    again = launched(tmp_path, "train", "--resume", "--out", "two")
    assert again.returncode == 0, again.stderr
    assert "continuing from step 3" in again.stderr
    resumed = weights_in(tmp_path / "two")
    assert all(torch.equal(resumed[name], weight) for name, weight in kept.items())
    refused = launched(tmp_path, "train", "--resume", "--out", "two", stage=3)
    assert refused.returncode != 0
    assert "checkpoint must be of the same engine" in refused.stderr
    plain = [sys.executable, "-m", "regrad_runner", "train", "--resume", "--out", "two"]
    refused = finished(plain, tmp_path, PATIENCE, {})
    assert refused.returncode == 2
    assert "got zero-2 on 2 processes there and no engine here" in refused.stderr.replace("'", "")
