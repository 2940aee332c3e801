"""Checkpoints that continue a run exactly: everything by name, whole or absent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from regrad.errors import RegradError
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_runner.training import Point, TrainingRun

FORMAT = 1
KEPT = 2
PREFIX = "step-"


def save_checkpoint(run: TrainingRun, folder: Path) -> Path:
    """Write where a run is, so that `load_checkpoint` continues it exactly.

    The checkpoint is written under another name, forced to the disk and renamed: a kill leaves it whole or absent.
    The one before it is kept. Call it on every process; the first one writes.

    Args:
        run: After an optimizer step.
        folder: Holds the run's checkpoints; made if it does not exist.

    Returns:
        The checkpoint's folder: `tensors.pt`, which `torch.load(weights_only=True)` reads, and `state.json`.

    Raises:
        RegradError: In the middle of an accumulation, whose gradients a checkpoint does not hold.
    """
    done = run.position.batch % run.config.accumulate
    if done:
        raise RegradError(
            f"checkpoint must be saved after an optimizer step, got micro-batch {done} of {run.config.accumulate}"
        )
    own = gather_object([{"random": random_state(), "loss_sum": run.loss_sum.item()}])
    path = folder / f"{PREFIX}{run.position.step:08d}"
    if run.accelerator.is_main_process:
        _write(path, tensors={**_tensors(run), "of_each_process": own}, state=_state(run))
        for old in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(run: TrainingRun, path: Path) -> None:
    """Put a run where it was when `path` was written.

    Args:
        run: Freshly made, of the same configuration.
        path: A checkpoint's folder.

    Raises:
        RegradError: If the checkpoint is of another format, or parameters or corrections differ.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise RegradError(f"checkpoint must be of format {FORMAT}, got {state['format']!r} in '{path}'")
    tensors = torch.load(path / "tensors.pt", map_location="cpu", weights_only=True)
    model = run.accelerator.unwrap_model(run.model)
    model.load_state_dict(tensors["model"])
    load_optimizer(model, run.optimizer.optimizer, tensors["optimizer"])
    run.attachment.load_state_dict(tensors["attachment"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    position = run.position
    position.step, position.epoch, position.batch = state["step"], state["epoch"], state["batch"]
    position.points = [Point(**point) for point in state["points"]]
    run.begin_lap()
    own = tensors["of_each_process"][run.accelerator.process_index % len(tensors["of_each_process"])]
    run.loss_sum.fill_(own["loss_sum"])
    set_random_state(own["random"])


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by the parameters' names in the model."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "state": {names[p]: dict(values) for p, values in optimizer.state.items()}}


def load_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Take back what `optimizer_state` returned, whatever the order of the parameters now.

    Raises:
        RegradError: If a group now holds other parameters than then.
    """
    named = dict(model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    groups, state, count = [], {}, 0
    for index, group in enumerate(optimizer.param_groups):
        here = [names[p] for p in group["params"]]
        old = next((g for g in saved["groups"] if set(g["params"]) == set(here)), None)
        if old is None:
            raise RegradError(f"optimizer must have the checkpoint's parameter groups, got others in group {index}")
        places = range(count, count + len(here))
        state.update({place: saved["state"][n] for place, n in zip(places, here, strict=True) if n in saved["state"]})
        groups.append({**old, "params": list(places)})
        count += len(here)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """Return every global random state as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take back what `random_state` returned."""
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tensors(run: TrainingRun) -> dict[str, Any]:
    model = run.accelerator.unwrap_model(run.model)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer_state(model, run.optimizer.optimizer),
        "attachment": run.attachment.state_dict(),
    }


def _state(run: TrainingRun) -> dict[str, Any]:
    scaler = run.accelerator.scaler
    return {
        "format": FORMAT,
        "step": run.position.step,
        "epoch": run.position.epoch,
        "batch": run.position.batch,
        "points": [asdict(point) for point in run.position.points],
        "scheduler": run.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def _write(path: Path, *, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with (aside / "tensors.pt").open("wb") as file:
        torch.save(dict(tensors), file)
        file.flush()
        os.fsync(file.fileno())
    with (aside / "state.json").open("w", encoding="utf-8") as text:
        json.dump(state, text)
        text.flush()
        os.fsync(text.fileno())
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renaming is on the disk when it returns
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))
