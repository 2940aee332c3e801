import importlib.util
import json
import re

import pytest
import regrad
from regrad_runner.comparing.plan import make_plan
from regrad_runner.diagnostics.explaining import explain
from regrad_runner.settings import engine
from regrad_runner.settings.config import CompareConfig, TrainConfig
from regrad_runner.settings.engine import engine_config
from regrad_runner.training.processes import make_accelerator


@pytest.fixture
def installed(monkeypatch):
    """Let everything that DeepSpeed needs seem to be installed, and ask for DeepSpeed."""
    monkeypatch.setattr(engine, "NEEDED", ())
    monkeypatch.setattr(regrad, "available", lambda group: ["zero"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


@pytest.fixture
def file(monkeypatch, tmp_path):
    """Write the launcher's file of DeepSpeed."""

    def write(values):
        path = tmp_path / "deepspeed.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))

    return write


@pytest.mark.usefixtures("installed")
def test_settings_decide_everything_but_the_section_of_zero(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert engine_config(TrainConfig(accumulate=4, clip_norm=0.5)) == {
        "zero_optimization": {"stage": 3},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
    }


@pytest.mark.usefixtures("installed")
def test_the_stage_is_that_of_accelerate_where_nobody_says():
    assert engine_config(TrainConfig())["zero_optimization"] == {"stage": 2}


@pytest.mark.usefixtures("installed")
def test_a_file_gives_the_section_of_zero(file):
    section = {"stage": 1, "reduce_bucket_size": 1000}
    given = {
        "zero_optimization": section,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "steps_per_print": 10,
    }
    file(given)
    made = engine_config(TrainConfig(accumulate=2))
    assert made["zero_optimization"] == section
    assert made["gradient_clipping"] == 0.0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3, got 0; "),
        ({"zero_optimization": {"stage": True}}, "stage must be 1, 2 or 3, got True; "),
        ({"zero_optimization": {}}, "stage must be 1, 2 or 3, got None; "),
        ({"zero_optimization": [2]}, "stage must be 1, 2 or 3, got None; "),
        ({"gradient_clipping": 1.0}, "gradient_clipping must be 0.0 in DeepSpeed's configuration"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1 in DeepSpeed"),
        ({"train_batch_size": 64}, "train_batch_size must be 'auto' in DeepSpeed's configuration"),
        ({"bf16": {"enabled": True}}, "bf16 must be off in DeepSpeed's configuration, got True"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer must be left out of DeepSpeed's config"),
        ({"curriculum_learning": {}}, "curriculum_learning must be left out of DeepSpeed's config"),
    ],
)
def test_a_file_that_contradicts_the_settings_is_refused(file, change, message):
    file({"zero_optimization": {"stage": 2}, **change})
    with pytest.raises(ValueError, match=re.escape(message)):
        engine_config(TrainConfig())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "must hold a JSON object, got list"), ("{", "must name a file of JSON")],
)
def test_a_file_that_is_no_object_is_refused(file, text, message):
    file(text)
    with pytest.raises(ValueError, match=f"ACCELERATE_DEEPSPEED_CONFIG_FILE {message}"):
        engine_config(TrainConfig())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "stage must be 1, 2 or 3, got 0; --zero_stage 2"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "two", "must be 1, 2 or 3, got 'two'"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "must be 'none', got 'cpu'"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "must be 'none', got 'nvme'"),
        ("ACCELERATE_USE_CPU", "true", "ACCELERATE_USE_CPU must be left out with DeepSpeed"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "gone.json", "must name a file of JSON, got 'gone.js"),
    ],
)
def test_what_a_launcher_asks_for_and_nothing_is_proved_about_is_refused(
    monkeypatch, name, value, message
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        engine_config(TrainConfig())


@pytest.mark.usefixtures("installed")
def test_precisions_other_than_float32_are_refused():
    with pytest.raises(ValueError, match="mixed_precision must be 'no' with DeepSpeed, got 'bf16'"):
        engine_config(TrainConfig(mixed_precision="bf16"))


def test_what_is_not_installed_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed must be installed to train with DeepSpeed"):
        make_accelerator(TrainConfig())


def test_the_layout_must_be_installed_too(monkeypatch):
    monkeypatch.setattr(engine, "NEEDED", ())
    monkeypatch.setattr(regrad, "available", lambda group: [])
    with pytest.raises(ValueError, match="regrad-deepspeed must be installed to train with Deep"):
        engine_config(TrainConfig())


def test_commands_other_than_train_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="must be left out for regrad compare, got 'true'"):
        make_plan(CompareConfig(workload="digits", corrections=()), jobs=1)
    with pytest.raises(ValueError, match="must be left out for regrad explain, got 'true'"):
        explain(TrainConfig(workload="digits"))
