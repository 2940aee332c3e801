"""How many processes there are, and what is said where a launcher started others than were asked for."""

from __future__ import annotations

import gc
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType

from regrad_runner.settings.config import RunConfig
from regrad_runner.settings.environment import asked_to_shard, check_launcher, settings_win


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return an Accelerator whose batches do not depend on the number of processes.

    Settings win over what accelerate would read from the environment: see
    `regrad_runner.settings.environment`.

    Raises:
        ValueError: If a launcher asked for an engine that is not trained with, if the precision or
            the sharding needs hardware that is missing, or if there are more or fewer processes
            than asked.
    """
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError(
            "mixed_precision must be 'no' or 'bf16' without an accelerator device, got 'fp16'"
        )
    threads = torch.get_num_threads()
    check_launcher()
    with settings_win():
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else accelerate's CUDA build makes one process of torchrun's
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
    torch.set_num_threads(
        threads
    )  # accelerate chooses others where several processes are on one CPU
    _check_processes(config, accelerator.num_processes)
    _check_sharding(accelerator)
    return accelerator


def check_task() -> None:
    """Raise a `ValueError` if this is one of several tasks of srun that know nothing of each other."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun must start one launcher per node, got {tasks} tasks that each would do the same; "
            f"use srun --ntasks-per-node 1 torchrun --nnodes M --nproc-per-node N -m regrad_runner …"
        )


def _check_processes(config: RunConfig, started: int) -> None:
    """Raise unless as many processes run as were asked for: `accelerate launch --cpu` starts only one."""
    # Only accelerate's launcher for one process sets the first two without the third.
    launched = {
        "MASTER_ADDR",
        "ACCELERATE_MIXED_PRECISION",
    } <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if config.processes not in (None, started):
        raise ValueError(
            f"processes must be {config.processes} as asked, got {started}; {_launch(config.processes)}"
        )
    if launched and started == 1:
        raise ValueError(
            f"processes must be several as asked of accelerate launch, got 1; {_launch('N')}"
        )
    share = config.accumulate * started
    if config.batch_size is not None and config.batch_size % share:
        raise ValueError(
            f"batch_size must be a multiple of accumulate × processes ({config.accumulate} × {started}), "
            f"got {config.batch_size}"
        )


def _launch(processes: int | str | None) -> str:
    if processes == 1:
        return "launch with: python -m regrad_runner …"
    return (
        f"launch with: torchrun --nproc-per-node {processes} -m regrad_runner …, or on each of M nodes an M-th of them "
        "and --nnodes M --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    )


def _check_sharding(accelerator: Accelerator) -> None:
    """Raise unless a model is sharded as accelerate was asked to, by FSDP2."""
    if not asked_to_shard():
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"use_fsdp must be asked for on accelerator devices, got {accelerator.device.type!r}, where accelerate "
            "would train unsharded without a word; leave it out here"
        )
    if not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version must be 2, got 1, whose flat shards corrections cannot read; --fsdp_version 2"
        )


def leave_processes() -> None:
    """End the process group, if there is one. Call it on every process, after the last run was let go.

    Left to the end of the interpreter, threads of the group or of a model that is still wrapped
    abort the process ("terminate called without an active exception"; seen in one of five launches
    on gloo).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # hooks and models refer to each other
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
