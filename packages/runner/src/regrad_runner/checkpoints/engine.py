"""The part of a checkpoint that DeepSpeed's engine writes and reads: what training changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad.errors import RegradError
from regrad.receipt import differences
from torch.serialization import get_unsafe_globals_in_checkpoint

from regrad_runner.checkpoints.folder import ENGINE, engine_files
from regrad_runner.checkpoints.states import check_order
from regrad_runner.errors import DiskError
from regrad_runner.settings.checking import shown
from regrad_runner.training.processes import on_first_process

if TYPE_CHECKING:
    from regrad_runner.training.run import TrainingRun

# What DeepSpeed's own files hold beside tensors and plain values, and what its loading may run.
OBJECTS_OF_DEEPSPEED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
NO_ENGINE = "no engine"


def engine_identity(run: TrainingRun) -> dict[str, Any] | None:
    """Return what must be the same when an engine continues, as JSON holds it; None without one."""
    if run.engine is None:
        return None
    return {
        "layout": run.attachment.engine.layout.name,
        "processes": run.accelerator.num_processes,
    }


def check_engine(run: TrainingRun, state: Mapping[str, Any]) -> None:
    """Compare the engine of a checkpoint with that of the run.

    Args:
        run: The run that is to continue.
        state: Of the checkpoint, as JSON held it.

    Raises:
        RegradError: If the stage or the number of processes differs, or if one has an engine and
            the other has none.
    """
    then = state.get("engine")
    now = engine_identity(run)
    if then != now:
        raise RegradError(
            f"checkpoint must be of the same engine, got {_in_words(then)} there and "
            f"{_in_words(now)} here; DeepSpeed's checkpoints fit the stage and the number of "
            "processes that wrote them: launch in the same way, or start again in another folder"
        )


def _in_words(engine: Any) -> str:
    """Say which engine a checkpoint or a run has."""
    if engine is None:
        return NO_ENGINE
    if not isinstance(engine, Mapping):
        return shown(engine)
    return f"{shown(engine.get('layout'))} on {shown(engine.get('processes'))} processes"


def check_engine_path(path: Path) -> None:
    """Raise a `ValueError` if DeepSpeed could not find its files again: it looks by pattern."""
    if re.search(r"[*?\[]", str(path)):
        raise ValueError(
            f"out must have no *, ? or [ with DeepSpeed, got {shown(str(path))}; choose another "
            "folder"
        )


def save_engine(engine: Any, folder: Path) -> None:
    """Let an engine write weights, and the state of optimizer and corrections.

    Call it on every process: each writes its part.

    Args:
        engine: DeepSpeed's.
        folder: An empty folder that all processes see; gets a folder `ENGINE`.

    Raises:
        DiskError: On the process that cannot write its part.
    """
    try:
        engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False)
    except (OSError, RuntimeError) as problem:  # torch.save raises either
        raise DiskError(
            f"checkpoint must be written, got {problem}; earlier ones are intact: free some space "
            "and use --resume"
        ) from problem


def load_engine(run: TrainingRun, path: Path, receipt: Mapping[str, Any]) -> None:
    """Let the engine of a run read what `save_engine` wrote; what may be refused comes first.

    Args:
        run: Freshly made.
        path: The checkpoint, whose files are undamaged.
        receipt: Of the checkpoint.

    Raises:
        RegradError: If the corrections, their options or their order differ, or if the files would
            run code.
    """
    check_order(run.attachment, receipt)
    found = "; ".join(differences(receipt, run.attachment.receipt()))
    if found:
        raise RegradError(f"checkpoint must be of the same corrections; {found}")
    on_first_process(run.accelerator, lambda: check_engine_files(path))
    loaded, _ = run.engine.load_checkpoint(str(path), tag=ENGINE)  # type: ignore[union-attr]
    if loaded is None:
        raise RegradError(f"checkpoint must hold the files of DeepSpeed, got none in '{path}'")
    if not run.attachment.corrections:
        # The optimizer that DeepSpeed has loaded holds nothing of ours then, no count of steps.
        run.attachment.load_state_dict({"corrections": {}, "effects": {}, "receipt": receipt})


def check_engine_files(path: Path) -> None:
    """Raise a `RegradError` if an engine's file would run code that is not DeepSpeed's own.

    DeepSpeed loads objects, and not tensors alone. Nothing is loaded here.
    """
    for file in engine_files(path):
        try:
            named = set(get_unsafe_globals_in_checkpoint(file))
        except Exception as problem:
            raise RegradError(
                f"checkpoint must be a file written by torch.save, got something else in '{file}'"
            ) from problem
        foreign = sorted(named - OBJECTS_OF_DEEPSPEED)
        if foreign:
            raise RegradError(
                "checkpoint must hold tensors, plain values and DeepSpeed's own objects only, got "
                f"{shown(foreign[0])} in '{file}', which would run code; it is not loaded: remove "
                "it if you do not know where it comes from"
            )
