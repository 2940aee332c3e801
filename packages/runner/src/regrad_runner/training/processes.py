"""The processes of a run: as many as requested, and sharded as requested."""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from regrad.errors import RegradError

from regrad_runner.settings.config import RunConfig
from regrad_runner.settings.engine import decided_in_engine, engine_config
from regrad_runner.settings.environment import (
    asked_for_deepspeed,
    asked_to_shard,
    check_launcher,
    settings_win,
)

STORE_OF_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
Value = TypeVar("Value")


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return an Accelerator whose batches do not depend on the number of processes.

    Settings win over what accelerate would read from the environment: see
    `regrad_runner.settings.environment`.

    Raises:
        ValueError: If a launcher asked for an engine that is not trained with, or for a set-up of
            one in which nothing is proved, if the precision or the sharding needs hardware that is
            missing, or if there are more or fewer processes than asked, or if a launcher would
            restart processes that then wait for ever.
    """
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError(
            "mixed_precision must be 'no' or 'bf16' without an accelerator device, got 'fp16'"
        )
    check_launcher()
    _check_restarts()
    _leave_store_of_dead()
    _note_missing("lomo_optim")
    threads = torch.get_num_threads()
    engine = engine_config(config) if asked_for_deepspeed() else None
    with settings_win(), _away_from_results(engine):
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            **_device_options(engine),
        )
    if engine is not None:
        # Of a second run in this process, accelerate would keep what the first one's settings said.
        accelerator.deepspeed_plugin.deepspeed_config.update(decided_in_engine(config))
    # accelerate chooses another number if several processes share a CPU.
    torch.set_num_threads(threads)
    _check_processes(config, accelerator.num_processes)
    _check_sharding(accelerator)
    return accelerator


def _device_options(engine: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options by which accelerate chooses devices, and trains with an engine.

    Args:
        engine: DeepSpeed's configuration; None to train without it.
    """
    has_device = torch.accelerator.is_available()
    if engine is None:
        # Unless told otherwise, accelerate's CUDA build treats torchrun's processes as one.
        return {"cpu": not has_device}
    if is_initialized():  # it keeps the engine's configuration, and refuses a second one
        return {}
    # The runner's models are small, and are made whole.
    plugin = DeepSpeedPlugin(hf_ds_config=engine, zero3_init_flag=False)
    # Without a backend that is named, accelerate takes each process on a CPU for the only one.
    backend = [] if has_device else [InitProcessGroupKwargs(backend="gloo")]
    return {"deepspeed_plugin": plugin, "kwargs_handlers": backend}


def _away_from_results(engine: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """Return a block in which DeepSpeed, where it is imported, finds stderr for all of its lines.

    Results go to stdout, perhaps into another program.
    """
    return nullcontext() if engine is None else redirect_stdout(sys.stderr)


def _check_restarts() -> None:
    """Raise a `ValueError` if processes on several nodes could not find each other after a restart.

    Each node's launcher counts its own restarts, so `_leave_store_of_dead` cannot help there.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if _uses_store_of_launcher() and int(restarts) > 0 and int(nodes) > 1:
        raise ValueError(
            f"{OWN_STORE} must be 1 for torchrun to restart processes on several nodes, got "
            f"--max-restarts {restarts} without it; export it on every node"
        )


def _leave_store_of_dead() -> None:
    """Let processes that torchrun has restarted meet in a new store.

    By default torchrun keeps one store for all lives of its processes. The addresses that the dead
    ones left there let the next ones wait for ever (issue 135712 of pytorch).
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or not _uses_store_of_launcher():
        return
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    key = f"regrad/port/{restarts}"
    if os.environ["RANK"] == "0":
        store.set(key, str(_free_port()))
    os.environ["MASTER_PORT"] = store.get(key).decode()  # waits until it is set
    os.environ[STORE_OF_LAUNCHER] = "False"


def _uses_store_of_launcher() -> bool:
    """Say whether the processes meet in a store that outlives them."""
    return os.environ.get(STORE_OF_LAUNCHER) == "True"


def _free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _note_missing(module: str) -> None:
    """Let Python know of a module that is not installed.

    Accelerate looks for this one twice in every step, in every folder of `sys.path`.
    """
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        sys.modules[module] = None  # type: ignore[assignment]


def check_task() -> None:
    """Raise a `ValueError` if srun started several tasks that know nothing of one another."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun must start one launcher per node, got {tasks} tasks, each of which would start "
            "one; use srun --ntasks-per-node 1 torchrun --nnodes M --nproc-per-node N -m "
            "regrad_runner …"
        )


def _check_processes(config: RunConfig, started: int) -> None:
    """Raise unless as many processes run as were requested."""
    if config.processes not in (None, started):
        raise ValueError(
            f"processes must be {config.processes} as asked, got {started}; "
            f"{_launch(config.processes)}"
        )
    if started == 1 and _is_launched_alone():
        raise ValueError(
            f"processes must be several as asked of accelerate launch, got 1; {_launch('N')}"
        )
    share = config.accumulate * started
    if config.batch_size is not None and config.batch_size % share:
        raise ValueError(
            f"batch_size must be a multiple of accumulate × processes "
            f"({config.accumulate} × {started}), got {config.batch_size}"
        )


def _is_launched_alone() -> bool:
    """Say whether `accelerate launch --cpu` started this process: it starts one, whatever is asked.

    Only its launcher for one process sets the first two of these without the third.
    """
    has_address = "MASTER_ADDR" in os.environ
    has_precision = "ACCELERATE_MIXED_PRECISION" in os.environ
    return has_address and has_precision and "WORLD_SIZE" not in os.environ


def _launch(processes: int | str | None) -> str:
    """Say how to start so many processes."""
    if processes == 1:
        return "launch with: python -m regrad_runner …"
    return (
        f"launch with: torchrun --nproc-per-node {processes} -m regrad_runner …, or on each of M "
        "nodes 1/M of them and --nnodes M --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    )


def _check_sharding(accelerator: Accelerator) -> None:
    """Raise unless a model is sharded as accelerate was asked to, by FSDP2."""
    if not asked_to_shard():
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"use_fsdp must be asked for on accelerator devices, got {accelerator.device.type!r}, "
            "where accelerate would silently train unsharded; leave it out here"
        )
    if not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version must be 2, got 1, whose flat shards corrections cannot read; "
            "--fsdp_version 2"
        )


def on_first_process(accelerator: Accelerator, action: Callable[[], Value]) -> Value:
    """Do something on the first process; every process returns its result, or raises its error.

    Args:
        accelerator: Of the processes. Call it on each of them.
        action: Raises `ValueError` or `RegradError` if something is wrong; another error ends the
            first process alone.
    """
    shared: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            shared[0] = action()
        except (ValueError, RegradError) as problem:
            shared[1] = problem
    broadcast_object_list(shared)
    result: Value = shared[0]
    error: ValueError | RegradError | None = shared[1]
    if error is not None:
        raise error
    return result


def destroy_process_group() -> None:
    """End the process group, if there is one.

    Call it on every process, when nothing refers to the last run any more.

    Left to the end of the interpreter, threads of the group or of a model that is still wrapped
    abort the process ("terminate called without an active exception"; seen in one of five launches
    on gloo).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # hooks and models refer to each other
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
