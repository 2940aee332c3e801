"""Which set-ups of DeepSpeed are served, and why others are refused."""

from __future__ import annotations

from typing import Any

import torch
from regrad import RegradError

from regrad_deepspeed.stages import CutWeights, Stage, WholeWeights

UNPROVED = "there nothing is proved about corrections"


def stage_of(optimizer: Any) -> Stage | None:
    """Return the parameters that an optimizer of ZeRO steps; None for any other optimizer."""
    # deepspeed takes seconds to import; whoever calls this has seen that it is.
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: PLC0415
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: PLC0415

    if type(optimizer) is DeepSpeedZeroOptimizer:
        return WholeWeights(optimizer)
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return CutWeights(optimizer)
    return None


def refuse_other_optimizers(optimizer: Any) -> None:
    """Raise if an optimizer is one of DeepSpeed's that is not served.

    Args:
        optimizer: As given to attach.

    Raises:
        RegradError: With its class, and what to do instead.
    """
    layer = optimizer
    while layer is not None:
        kind = type(layer)
        if kind.__module__.startswith("deepspeed.runtime"):
            raise RegradError(
                "the optimizer must be that of ZeRO, stage 1, 2 or 3, got DeepSpeed's "
                f"{kind.__name__}: {UNPROVED}; set zero_optimization.stage, in float32 or bf16"
            )
        layer = getattr(layer, "optimizer", None)


def refuse_unproved(optimizer: Any) -> None:
    """Raise where ZeRO is set up in a way in which corrections are not proved exact.

    Args:
        optimizer: Of ZeRO, any stage.

    Raises:
        RegradError: With the setting, and what to do instead.
    """
    _refuse_half_precision(optimizer)
    _refuse_offload(optimizer)
    _refuse_cut_models(optimizer)
    if getattr(optimizer, "zenflow", False):
        raise RegradError(f"zenflow must be off: {UNPROVED}; use ZeRO without it")
    if getattr(optimizer, "uses_muon", False) or getattr(optimizer, "use_muon", False):
        raise RegradError(
            "the optimizer must not be DeepSpeed's Muon, which changes gradients before the step; "
            "use torch's optimizers"
        )
    if optimizer.elastic_checkpoint:
        raise RegradError(
            "elastic_checkpoint must be off: the corrections' state would not be saved; leave it "
            "out of the configuration"
        )


def _refuse_half_precision(optimizer: Any) -> None:
    """Refuse loss scaling, and weights that are stepped in less than float32."""
    if optimizer.dtype == torch.float16 or optimizer.torch_autocast_gradscaler is not None:
        raise RegradError(
            f"fp16 must be off: DeepSpeed scales its gradients, and {UNPROVED}; use bf16"
        )
    kind = optimizer.master_weights_and_grads_dtype
    if kind != torch.float32:
        raise RegradError(
            f"DeepSpeed must step float32 weights, got {kind}; leave "
            "bf16_master_weights_and_grads out of the configuration"
        )


def _refuse_offload(optimizer: Any) -> None:
    """Refuse what DeepSpeed keeps on another device than it trains on."""
    kept_elsewhere = ("cpu_offload", "offload_optimizer", "offload_param")
    if any(getattr(optimizer, name, False) for name in kept_elsewhere):
        raise RegradError(
            "offload_optimizer and offload_param must be off: DeepSpeed then keeps gradients and "
            f"their norms elsewhere, and {UNPROVED}; leave them out of the configuration"
        )


def _refuse_cut_models(optimizer: Any) -> None:
    """Refuse models of which processes hold different parts, other than by ZeRO."""
    is_cut = optimizer.model_parallel_group is not None or optimizer.sequence_parallel_size > 1
    if is_cut or getattr(optimizer, "has_moe_layers", False):
        raise RegradError(
            f"ZeRO must be the only parallelism beside data, got experts, model or sequence "
            f"parallelism: {UNPROVED}; use FSDP2 with tensor parallelism"
        )
    if getattr(optimizer, "zero_hpz_partition_size", 1) > 1:
        raise RegradError(
            f"zero_hpz_partition_size must be 1: DeepSpeed then reads weights from a second copy, "
            f"and {UNPROVED}; leave it out of the configuration"
        )
