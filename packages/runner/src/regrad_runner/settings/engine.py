"""What accelerate's launcher asks of DeepSpeed, and what the settings decide there."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regrad

from regrad_runner.files import read_bytes
from regrad_runner.settings.checking import shown
from regrad_runner.settings.config import RunConfig
from regrad_runner.settings.environment import (
    DEEPSPEED,
    OF_DEEPSPEED,
    ONLY_CPUS,
    asked_for_deepspeed,
    is_on,
)

STAGE = f"{OF_DEEPSPEED}ZERO_STAGE"
CONFIG_FILE = f"{OF_DEEPSPEED}CONFIG_FILE"
OFFLOADS = (f"{OF_DEEPSPEED}OFFLOAD_OPTIMIZER_DEVICE", f"{OF_DEEPSPEED}OFFLOAD_PARAM_DEVICE")
USUAL_STAGE = "2"  # accelerate's
STAGES_OF_ZERO = (1, 2, 3)
ZERO = "zero_optimization"
FROM_ACCELERATE = "auto"
# accelerate itself needs transformers for DeepSpeed.
NEEDED = ("deepspeed", "transformers")
# Number formats are off unless they say that they are on.
NUMBER_FORMATS = ("fp16", "bf16", "amp", "torch_autocast")
# What a file may say beside ZeRO's own section: the rest is not proved to train as one process.
HARMLESS = (
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


def refuse_deepspeed(command: str) -> None:
    """Raise a `ValueError` if a command that does not train with DeepSpeed was asked to.

    Args:
        command: What was started, such as "regrad compare".
    """
    if asked_for_deepspeed():
        raise ValueError(
            f"{DEEPSPEED} must be left out for {command}, got 'true': only regrad train trains "
            "with DeepSpeed; launch with torchrun"
        )


def engine_config(config: RunConfig) -> dict[str, Any]:
    """Return the configuration of DeepSpeed for a run, as `deepspeed.initialize` takes it.

    ZeRO's section is that of the launcher; the settings decide the rest. DeepSpeed does not clip:
    the runner does, before the corrections.

    Args:
        config: Resolved settings.

    Raises:
        ValueError: If something needed is not installed, or if the launcher asks for what is not
            proved, or for something else than the settings say.
    """
    _check_installation()
    _check_machine(config)
    asked = _read_file() or {ZERO: {"stage": _stage_of_launcher()}}
    _check_section(asked)
    decided = decided_in_engine(config)
    _check_rest(asked, decided)
    return {**asked, **decided}


def decided_in_engine(config: RunConfig) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that the settings of a run decide.

    accelerate takes the sizes of batches from the loader.
    """
    return {
        "train_batch_size": FROM_ACCELERATE,
        "train_micro_batch_size_per_gpu": FROM_ACCELERATE,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": 0.0,
    }


def _check_installation() -> None:
    """Raise unless DeepSpeed and what trains with it here are installed."""
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{module} must be installed to train with DeepSpeed, got no such module; install "
                f"{module}, or unset {DEEPSPEED}"
            )
    if "zero" not in regrad.available("regrad.layouts"):
        raise ValueError(
            "regrad-deepspeed must be installed to train with DeepSpeed, got no layout 'zero'; "
            f"install regrad-deepspeed, or unset {DEEPSPEED}"
        )


def _check_machine(config: RunConfig) -> None:
    """Raise if the precision, the device or an offload is one that is not proved."""
    if config.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision must be 'no' with DeepSpeed, got {config.mixed_precision!r}, in "
            "which it would keep the weights; leave it out"
        )
    if is_on(ONLY_CPUS):
        raise ValueError(
            f"{ONLY_CPUS} must be left out with DeepSpeed, got {shown(os.environ[ONLY_CPUS])}: "
            "accelerate would silently train without it; unset it"
        )
    for name in OFFLOADS:
        device = os.environ.get(name, "none")
        if device != "none":
            raise ValueError(
                f"{name} must be 'none', got {shown(device)}: nothing is proved there; unset it"
            )


def _stage_of_launcher() -> int:
    """Return the stage that the launcher asks for; what is no number is refused."""
    text = os.environ.get(STAGE, USUAL_STAGE)
    if not text.isdecimal():
        raise ValueError(f"{STAGE} must be 1, 2 or 3, got {shown(text)}; --zero_stage 2")
    return int(text)


def _read_file() -> dict[str, Any] | None:
    """Return what the launcher's file of DeepSpeed says; None without a file."""
    name = os.environ.get(CONFIG_FILE, "none")
    if name == "none":
        return None
    try:
        read = json.loads(read_bytes(Path(name)))
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"{CONFIG_FILE} must name a file of JSON, got {shown(name)}: {problem}"
        ) from problem
    if not isinstance(read, dict):
        message = f"{CONFIG_FILE} must hold a JSON object, got {type(read).__name__}"
        raise ValueError(message)  # noqa: TRY004 - it is the file that is wrong
    return read


def _check_section(asked: Mapping[str, Any]) -> None:
    """Raise unless ZeRO's section asks for a stage in which there is something to cut."""
    section = asked.get(ZERO)
    stage = section.get("stage") if isinstance(section, Mapping) else None
    if stage not in STAGES_OF_ZERO or isinstance(stage, bool):
        raise ValueError(
            f"{ZERO}.stage must be 1, 2 or 3, got {stage!r}; --zero_stage 2, or torchrun for runs "
            "that are data-parallel"
        )


def _check_rest(asked: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    """Raise if a file says what the settings decide, or what is not proved."""
    for name, value in asked.items():
        if name == ZERO or name in HARMLESS:
            continue
        if name in decided:
            if value not in (FROM_ACCELERATE, decided[name]):
                raise ValueError(
                    f"{name} must be {decided[name]!r} in DeepSpeed's configuration, got "
                    f"{value!r}: the settings batch_size, accumulate and clip_norm decide; leave "
                    "it out"
                )
        elif name in NUMBER_FORMATS:
            _check_format(name, value)
        else:
            raise ValueError(
                f"{name} must be left out of DeepSpeed's configuration: the settings decide it, "
                "or nothing is proved there"
            )


def _check_format(name: str, section: Any) -> None:
    """Raise if a section switches on a number format other than float32."""
    is_enabled = section.get("enabled", True) if isinstance(section, Mapping) else section
    if is_enabled not in (False, FROM_ACCELERATE):
        raise ValueError(
            f"{name} must be off in DeepSpeed's configuration, got {is_enabled!r}: runs with "
            "DeepSpeed are in float32; leave it out"
        )
