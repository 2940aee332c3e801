"""Checkpoints that continue a run exactly: everything by name, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from regrad.errors import RegradError

from regrad_runner.checkpoints.engine import check_engine, engine_identity, load_engine, save_engine
from regrad_runner.checkpoints.folder import (
    Content,
    make_engine_folder,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)
from regrad_runner.checkpoints.matching import (
    MOVED,
    check_inventory,
    check_optimizer,
    check_settings,
    check_tensors,
    identity,
    inventory,
)
from regrad_runner.checkpoints.states import (
    corrections_state,
    load_corrections,
    load_model,
    load_optimizer,
    model_state,
    optimizer_state,
    random_state,
    set_random_state,
)
from regrad_runner.results.points import Point
from regrad_runner.training.position import Position
from regrad_runner.training.processes import on_first_process
from regrad_runner.training.run import TrainingRun

CHECKPOINTS_KEPT = 2
LONGEST_REASON = 200
LARGEST_WHOLE_NUMBER = 2**53  # up to which every whole number is a float
# Raised by a checkpoint whose content has another type than was written.
UNFIT_CONTENT = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


def save_checkpoint(run: TrainingRun, folder: Path, *, keep: int = CHECKPOINTS_KEPT) -> Path:
    """Write where a run is, so that it can be continued exactly.

    The checkpoint is written under another name, forced to the disk and renamed: if the process is
    killed, it is complete or absent. Call it on every process; the first one writes.

    Args:
        run: After an optimizer step.
        folder: Holds the run's checkpoints; made if it does not exist.
        keep: How many of the last checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder: `tensors.pt`, which `torch.load(weights_only=True)` reads,
        `state.json`, `receipt.json`, and `checksums.json` of these three. With DeepSpeed weights,
        the optimizer's state and that of the corrections are in `engine`, as it writes them.

    Raises:
        RegradError: In the middle of an accumulation, whose gradients a checkpoint does not hold,
            or if it cannot be written to disk.
    """
    done = run.position.batch % run.config.accumulate
    if done:
        raise RegradError(
            "checkpoint must be saved after an optimizer step, "
            f"got micro-batch {done} of {run.config.accumulate}"
        )
    content = _content(run)
    step = run.position.step
    engine: Path | None = None
    if run.engine is not None:
        engine = on_first_process(run.accelerator, lambda: make_engine_folder(folder, step))
        save_engine(run.engine, engine)
    return on_first_process(
        run.accelerator, lambda: write_checkpoint(folder, step, content, keep=keep, engine=engine)
    )


def load_checkpoint(run: TrainingRun, path: Path) -> list[str]:
    """Restore a run to where it was when `path` was written.

    Call it on every process; the first one reads.

    Args:
        run: Freshly made, of the same configuration; the number of processes may be another.
        path: A checkpoint's folder.

    Returns:
        What is no longer exact, in words; nothing if there are as many processes as before. Also
        where the data were, if they were moved.

    Raises:
        RegradError: If the checkpoint is damaged, of another format or would run code, if settings,
            parameters, the optimizer's options or corrections differ, or if weights are not finite;
            says what, there and here.
    """
    return _take(run, path, on_first_process(run.accelerator, lambda: read_checkpoint(path)))


def load_latest(run: TrainingRun, folder: Path) -> tuple[Path | None, list[str]]:
    """Restore a run from the latest undamaged checkpoint, or leave it at its start.

    Args:
        run: As for `load_checkpoint`.
        folder: Holds the run's checkpoints, or does not exist.

    Returns:
        The checkpoint, and what to tell the user: damaged ones that were skipped, and what is no
        longer exact.

    Raises:
        RegradError: If there are checkpoints and none of them is whole, or as for
            `load_checkpoint`.
    """
    found = on_first_process(run.accelerator, lambda: read_latest(folder))
    if found is None:
        return None, []
    path, content, lines = found
    return path, [*lines, *_take(run, path, content)]


def _content(run: TrainingRun) -> Content:
    """Collect everything; what is sharded is whole on the first process alone."""
    scaler = run.accelerator.scaler
    own = {"random": random_state(), "loss_sum": run.loss_sum.item()}
    tensors = {**_trained(run), "of_each_process": gather_object([own])}
    state = {
        "identity": identity(run),
        "engine": engine_identity(run),
        MOVED: run.config.data_dir,
        "inventory": inventory(tensors),
        "step": run.position.step,
        "epoch": run.position.epoch,
        "batch": run.position.batch,
        "seconds": run.seconds,
        "points": [asdict(point) for point in run.position.points],
        "scheduler": run.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "watch": run.watch.state_dict(),
        "signs": run.signs.state_dict() if run.signs is not None else None,
        "processes": run.accelerator.num_processes,
    }
    return Content(tensors, state, run.receipt())


def _trained(run: TrainingRun) -> dict[str, Any]:
    """Collect what training changes; nothing where an engine writes it itself."""
    if run.engine is not None:
        return {}
    model = run.accelerator.unwrap_model(run.model)
    corrections = corrections_state(run.attachment)
    return {
        "model": model_state(model),
        "optimizer": optimizer_state(model, run.optimizer.optimizer),
        "corrections": {key: value for key, value in corrections.items() if key != "receipt"},
    }


def _take(run: TrainingRun, path: Path, content: Content) -> list[str]:
    """Restore everything, or raise `RegradError`."""
    try:
        return _take_all(run, path, content)
    except RegradError:
        raise
    except UNFIT_CONTENT as problem:
        why = " ".join(str(problem).split())[:LONGEST_REASON]
        raise RegradError(
            f"checkpoint must hold what this run needs, got {type(problem).__name__}: {why}"
        ) from problem


def _take_all(run: TrainingRun, path: Path, content: Content) -> list[str]:
    """Restore everything; what may be refused comes first."""
    tensors = content.tensors
    state = content.state
    lines = check_settings(run, state)
    check_engine(run, state)
    check_inventory(tensors, state)
    position = _position(run, state)
    scheduler = _scheduler_state(run, state, position)
    if run.engine is None:
        _take_trained(run, content, last_epoch=scheduler["last_epoch"])
    else:
        load_engine(run, path, content.receipt)
    run.scheduler.load_state_dict(scheduler)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.watch.load_state_dict(_checked(state["watch"], run.watch.state_dict(), "watch"))
    if run.signs is not None:
        run.signs.load_state_dict(_checked(state["signs"], run.signs.state_dict(), "signs"))
    run.continue_from(position)
    return [*lines, *_take_own(run, tensors["of_each_process"])]


def _take_trained(run: TrainingRun, content: Content, *, last_epoch: int) -> None:
    """Restore what training changed; what may be refused comes first."""
    tensors = content.tensors
    check_tensors(run, tensors, content.state)
    check_optimizer(run, tensors["optimizer"]["groups"], last_epoch)
    model = run.accelerator.unwrap_model(run.model)
    load_model(model, tensors["model"])
    load_optimizer(model, run.optimizer.optimizer, tensors["optimizer"])
    # After the optimizer, whose state comes without that of the corrections here.
    load_corrections(run.attachment, {**tensors["corrections"], "receipt": content.receipt})


def _position(run: TrainingRun, state: Mapping[str, Any]) -> Position:
    """Return how far the run was, or raise `RegradError` if this one cannot get there."""
    step = state["step"]
    epoch = state["epoch"]
    batch = state["batch"]
    if not _is_place(run, step, epoch, batch):
        place = f"step {step!r}, epoch {epoch!r}, batch {batch!r}"
        raise RegradError(
            f"checkpoint must be from a step of this run, got {place} of {run.total_steps} steps"
        )
    like = asdict(Point(step=0, epoch=0.0, loss=0.0, value=0.0, lr=0.0, seconds=0.0))
    points = [Point(**_checked(point, like, "points")) for point in state["points"]]
    seconds = _checked(state["seconds"], 0.0, "seconds")
    return Position(step, epoch, batch, seconds=seconds, points=points)


def _is_place(run: TrainingRun, step: Any, epoch: Any, batch: Any) -> bool:
    """Say whether a run of these settings comes to this step, epoch and micro-batch."""
    if not all(type(number) is int and number >= 0 for number in (step, epoch, batch)):
        return False
    per_step = run.config.accumulate
    per_epoch = run.steps_per_epoch * per_step
    return bool(step * per_step == epoch * per_epoch + batch and step <= run.total_steps)


def _scheduler_state(
    run: TrainingRun, state: Mapping[str, Any], position: Position
) -> dict[str, Any]:
    """Return the scheduler's state; raise `RegradError` if it is not of this run and position."""
    fresh = run.scheduler.state_dict()
    saved: dict[str, Any] = _checked(state["scheduler"], fresh, "scheduler")
    is_of_run = saved["base_lrs"] == fresh["base_lrs"]
    if not is_of_run or not 0 <= saved["last_epoch"] <= position.step:
        raise RegradError(
            f"checkpoint must hold the scheduler of this run at step {position.step}, got {saved}"
        )
    return saved


def _checked(value: Any, like: Any, what: str) -> Any:
    """Return a value of JSON; raise `RegradError` unless it has the shape and types of another."""
    if not _is_alike(value, like):
        raise RegradError(
            f"checkpoint must hold the {what} of this run, got {str(value)[:LONGEST_REASON]}"
        )
    if isinstance(like, dict):
        for key in like:
            _checked(value[key], like[key], what)
    elif isinstance(like, list):
        for one, other in zip(value, like, strict=True):
            _checked(one, other, what)
    return value


def _is_alike(value: Any, like: Any) -> bool:
    """Say whether a value of JSON is of the kind of another; what is in them is not compared."""
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys()
    if isinstance(like, list):
        return isinstance(value, list) and len(value) == len(like)
    if type(value) is int:
        is_number = type(like) is int or isinstance(like, float)
        return is_number and abs(value) < LARGEST_WHOLE_NUMBER
    return type(value) is type(like)


def _take_own(run: TrainingRun, then: Sequence[Any]) -> list[str]:
    """Restore what each process has for itself; for another number of them, the closest match."""
    now = run.accelerator.num_processes
    index = run.accelerator.process_index
    set_random_state(then[index % len(then)]["random"])
    if len(then) == now:
        run.loss_sum.fill_(then[index]["loss_sum"])
        return []
    run.loss_sum.fill_(sum(own["loss_sum"] for own in then) / len(then))
    return [
        f"the checkpoint was written by {len(then)} processes and continues on {now}: images keep "
        "their order, but sums are taken in another order (the last digits differ), batch "
        "normalisation sees other parts of a batch, and a model or correction that draws random "
        "numbers draws others"
    ]
