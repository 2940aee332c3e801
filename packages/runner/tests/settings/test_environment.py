import json
import os

import pytest
import torch
from regrad_runner.cli.main import main
from regrad_runner.settings import environment
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.processes import make_accelerator

SMALL = ["--train-size", "40", "--batch-size", "20", "--width", "4", "--epochs", "1"]
SMALL += ["--threads", "1", "--tracker", "none"]


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    """Take out what this machine's environment says."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in environment.CHANGE_NUMBERS:
            monkeypatch.delenv(name)


LEFT_BEHIND = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_GRADIENT_CLIPPING": "0.1",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_SPLIT_BATCHES": "false",
}


def test_settings_win_over_every_variable_that_a_launcher_left(monkeypatch):
    for name, value in LEFT_BEHIND.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(TrainConfig(accumulate=2))
    assert accelerator.gradient_accumulation_steps == 2
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.device.type != "meta"
    assert {name: os.environ[name] for name in LEFT_BEHIND} == LEFT_BEHIND


def test_what_is_hidden_comes_back_after_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ZeroDivisionError), environment.settings_win():
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
        raise ZeroDivisionError
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_what_is_not_used_is_said_with_the_setting_that_wins(monkeypatch):
    for name, value in LEFT_BEHIND.items():
        monkeypatch.setenv(name, value)
    not_used = "not used from the environment: ACCELERATE_"
    assert environment.environment_in_words(TrainConfig()) == [
        f"{not_used}GRADIENT_ACCUMULATION_STEPS=4; the setting accumulate is 1",
        f"{not_used}MIXED_PRECISION=bf16; the setting mixed_precision is no",
        f"{not_used}GRADIENT_CLIPPING=0.1; the setting clip_norm is None",
        f"{not_used}DYNAMO_BACKEND=inductor; models are not compiled",
        f"{not_used}TORCH_DEVICE=meta; CUDA_VISIBLE_DEVICES chooses devices",
    ]


def test_what_says_the_same_as_the_settings_or_nothing_is_not_worth_a_line(monkeypatch):
    assert environment.environment_in_words(TrainConfig()) == []
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch says unasked
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment.environment_in_words(TrainConfig(accumulate=2, batch_size=8)) == []
    assert environment.environment_in_words(TrainConfig(accumulate=2, mixed_precision="bf16")) == []


def test_what_decides_about_numbers_is_said_and_torn_no_terminal(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1\x1b[2J")
    assert environment.environment_in_words(TrainConfig()) == [
        "used from the environment: ATEN_CPU_CAPABILITY=default, NVIDIA_TF32_OVERRIDE='1\\x1b[2J'"
    ]


def test_what_shards_is_used_and_what_names_shards_without_sharding_is_not(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "FSDP_VERSION" not in environment.used()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (
        environment.used().items() >= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items()
    )


@pytest.mark.parametrize("there", [True, False])
def test_leaving_devices_alone_is_said_where_there_are_any(monkeypatch, there):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    assert ("ACCELERATE_USE_CPU" in environment.used()) == there


@pytest.mark.parametrize("name", sorted(environment.ENGINES))
def test_an_engine_that_is_not_trained_with_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"{name} must be left out, got 'true': runs are data-par"):
        make_accelerator(TrainConfig())
    monkeypatch.setenv(name, "false")
    make_accelerator(TrainConfig())


@pytest.mark.parametrize("name", environment.FLAGS)
def test_a_flag_that_is_neither_true_nor_false_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ValueError, match=f"{name} must be true or false, got 'maybe'; unset it"):
        make_accelerator(TrainConfig())


def test_a_run_makes_the_steps_of_its_settings_and_its_receipt_says_what_was_used(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert main(["train", *SMALL, "--out", str(tmp_path / "out")]) == 0
    receipt = json.loads(
        (tmp_path / "out" / "runs" / "baseline" / "0" / "receipt.json").read_text()
    )
    assert receipt["steps_applied"] == 2
    assert receipt["run"]["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    said = capsys.readouterr().err
    assert said.count("used from the environment: CUBLAS_WORKSPACE_CONFIG=:4096:8\n") == 1
    assert said.count("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2; the setting accumulate is 1") == 1


def test_a_rank_that_was_left_behind_silences_no_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--lr", "nan"]) == 2
    assert capsys.readouterr().err.startswith("regrad: lr must be ")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "--lr", "nan"]) == 2
    assert capsys.readouterr().err == ""
