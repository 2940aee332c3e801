"""What the environment may decide: settings take precedence over what a launcher left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from regrad_runner.settings.checking import shown
from regrad_runner.settings.config import RunConfig

LONGEST_VALUE = 60  # characters of a value that are shown
ACCELERATE_PREFIX = "ACCELERATE_"
FSDP = "ACCELERATE_USE_FSDP"
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
OF_DEEPSPEED = "ACCELERATE_DEEPSPEED_"
ONLY_CPUS = "ACCELERATE_USE_CPU"
FLAGS = (FSDP, DEEPSPEED, ONLY_CPUS, "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")
ON = ("true", "1", "yes", "y", "t", "on")  # as accelerate reads them
OFF = ("false", "0", "no", "n", "f", "off")
# What a launcher says about processes and shards, and what changes no number. Other variables of
# accelerate are hidden from it, or they would override the settings.
LET_THROUGH = frozenset(
    {
        *set(FLAGS) - {DEEPSPEED},
        "ACCELERATE_LOG_LEVEL",
        "ACCELERATE_USE_SAGEMAKER",
        "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE",
    }
)
ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
# These choose kernels, number formats or orders of summation in torch and its libraries, which no
# setting does.
CHANGE_NUMBERS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_LINALG_PREFER_CUSOLVER",
    "TORCH_LINALG_PREFER_MAGMA",
)
# These decide the setting `threads`, which is recorded whoever chose it.
THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def settings_win() -> Iterator[None]:
    """Hide from accelerate, in the block, the variables that would override its arguments."""
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ACCELERATE_PREFIX) and name not in LET_THROUGH
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def asked_to_shard() -> bool:
    """Say whether accelerate's launcher was asked for FSDP."""
    return is_on(FSDP)


def asked_for_deepspeed() -> bool:
    """Say whether accelerate's launcher was asked for DeepSpeed."""
    return is_on(DEEPSPEED)


def check_launcher() -> None:
    """Raise a `ValueError` if a launcher was asked for what the runner does not do.

    That is an engine that it does not train with, or a variable that is neither true nor false.
    """
    for name in FLAGS:
        if os.environ.get(name, "false").lower() not in (*ON, *OFF):
            raise ValueError(
                f"{name} must be true or false, got {shown(os.environ[name])}; unset it"
            )
    for name, engine in ENGINES.items():
        if is_on(name):
            raise ValueError(
                f"{name} must be left out, got {shown(os.environ[name])}: "
                "runs are data-parallel, or sharded by FSDP2 or DeepSpeed's ZeRO, not trained with "
                f"{engine}; unset it"
            )


def used() -> dict[str, str]:
    """Return the variables that affect numbers, besides the settings, by name."""
    names = {*CHANGE_NUMBERS, *THREADS}
    if asked_to_shard():
        names |= {FSDP, *(name for name in os.environ if name.startswith("FSDP_"))}
    if asked_for_deepspeed():
        names |= {DEEPSPEED, *(name for name in os.environ if name.startswith(OF_DEEPSPEED))}
    if is_on(ONLY_CPUS) and torch.accelerator.is_available():
        names.add(ONLY_CPUS)
    return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}


def not_used(config: RunConfig) -> dict[str, str]:
    """Return why variables that disagree with the settings are not followed, by name.

    Args:
        config: Resolved settings.
    """
    decided = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("accumulate", str(config.accumulate)),
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", config.mixed_precision),
    }
    reasons = {}
    for name, (setting, value) in decided.items():
        if os.environ.get(name, value).lower() not in (value, "no"):
            reasons[name] = f"the setting {setting} is {value}"
    if os.environ.get("ACCELERATE_GRADIENT_CLIPPING") not in (None, "", str(config.clip_norm)):
        reasons["ACCELERATE_GRADIENT_CLIPPING"] = f"the setting clip_norm is {config.clip_norm}"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        reasons["ACCELERATE_DYNAMO_BACKEND"] = "models are not compiled"
    if os.environ.get("ACCELERATE_TORCH_DEVICE"):
        reasons["ACCELERATE_TORCH_DEVICE"] = "CUDA_VISIBLE_DEVICES chooses devices"
    return reasons


def environment_in_words(config: RunConfig) -> list[str]:
    """Say which variables are used and which are not, a line each; no lines if none is set.

    Args:
        config: Resolved settings.
    """
    found = {name: value for name, value in used().items() if name not in THREADS}
    lines = [f"used from the environment: {_listed(found)}"] if found else []
    for name, reason in not_used(config).items():
        lines.append(
            f"not used from the environment: {_listed({name: os.environ[name]})}; {reason}"
        )
    return lines


def _listed(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in variables.items())


def _word(value: str) -> str:
    """Return a value as it is, or shortened and without what would break a terminal."""
    if value.isprintable() and len(value) <= LONGEST_VALUE:
        return value
    return shown(value)


def is_on(name: str) -> bool:
    """Say whether a variable is set to what accelerate takes for true."""
    return os.environ.get(name, "false").lower() in ON
