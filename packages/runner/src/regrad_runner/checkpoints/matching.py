"""Whether a checkpoint fits the run that continues from it: settings, weights, optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from regrad.errors import RegradError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from regrad_runner.checkpoints.states import group_of_names
from regrad_runner.settings.checking import shown
from regrad_runner.settings.continuing import WITHOUT_EFFECT_ON_RESULTS

if TYPE_CHECKING:
    from regrad_runner.training.run import TrainingRun

# Data may be moved, and corrections are compared with their options by the attachment.
NOT_COMPARED = WITHOUT_EFFECT_ON_RESULTS | {"data_dir", "corrections"}
MOVED = "data_dir"
INVENTORIED = ("model", "optimizer", "corrections")  # of which the inventory says what there is
ABSENT = "nothing"


def identity(run: TrainingRun) -> dict[str, Any]:
    """Return what must be the same when a run continues, by name, as JSON holds it.

    Args:
        run: Whose settings, seed, learning rate and numbers of samples these are.
    """
    settings = run.config.model_dump(mode="json")
    workload = run.workload
    return {
        **{name: value for name, value in settings.items() if name not in NOT_COMPARED},
        "seed": run.seed,
        "lr": run.lr,
        "training samples": len(workload.train),
        "validation samples": len(workload.validation),
        "test samples": len(workload.test),
    }


def inventory(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the number format and shape of every tensor in weights, optimizer and corrections.

    Each is named by its path, such as "model/fc.weight".

    Example:
        >>> inventory({"model": {"fc.weight": torch.zeros(2, 3)}})
        {'model/fc.weight': 'float32 [2, 3]'}
    """
    found: dict[str, str] = {}
    for part in INVENTORIED:
        for way, tensor in _tensors(tensors.get(part, {}), part):
            found[way] = _form(tensor)
    return found


def check_settings(run: TrainingRun, state: Mapping[str, Any]) -> list[str]:
    """Compare the settings of a checkpoint with those of the run.

    Args:
        run: The run that is to continue.
        state: Of the checkpoint, as JSON held it.

    Returns:
        What differs and is allowed to: where the data are.

    Raises:
        RegradError: If anything else differs; says what, there and here.
    """
    then = state.get("identity")
    if not isinstance(then, dict):
        raise RegradError(
            f"checkpoint must hold its settings, got {shown(then)}; "
            "it is from an earlier version: start again in another folder"
        )
    now = identity(run)
    for name in now | then:
        if then.get(name) != now.get(name):
            raise RegradError(
                f"checkpoint must have the settings of this run, got {name} "
                f"{shown(then.get(name))} there and {shown(now.get(name))} here; change it back, "
                "or start again in another folder"
            )
    place = state.get(MOVED)
    here = run.config.data_dir
    if place == here:
        return []
    return [
        f"the data were in {shown(place)} when the checkpoint was written, "
        f"and are in {shown(here)} now"
    ]


def check_inventory(tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Compare what a checkpoint holds with what was put into it.

    Args:
        tensors: Of the checkpoint.
        state: Of the checkpoint, as JSON held it.

    Raises:
        RegradError: If a tensor is missing, added, or of another shape or number format; names it.
    """
    _check_same(state["inventory"], inventory(tensors), "as it was written")


def check_tensors(run: TrainingRun, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Compare what a checkpoint holds with what the run needs.

    Args:
        run: The run that is to continue.
        tensors: Of the checkpoint.
        state: Of the checkpoint, as JSON held it.

    Raises:
        RegradError: If a tensor is missing, added, of another shape or number format, or not
            finite; names it.
    """
    model = run.accelerator.unwrap_model(run.model)
    needed = inventory({"model": get_model_state_dict(model)})
    held = inventory({"model": tensors["model"]})
    _check_same(needed, held, "of this model")
    weights = {name for name, _ in model.named_parameters()}
    # Batch normalisation has seen the batches of steps that were skipped: its statistics may be of
    # any size.
    clean = run.accelerator.scaler is None and state["watch"]["skipped"] == 0
    for name, tensor in _tensors(tensors["model"]):
        if (clean or name in weights) and not tensor.isfinite().all():
            raise RegradError(
                f"checkpoint must hold finite weights, got NaN or infinity in '{name}'"
            )
    for way, tensor in _tensors(tensors["optimizer"]):
        if tensor.isnan().any():
            raise RegradError(f"checkpoint must hold numbers in the optimizer, got NaN in '{way}'")


def check_optimizer(run: TrainingRun, groups: Any, last_epoch: int) -> None:
    """Compare the options of each group of parameters with those of this run's optimizer.

    Args:
        run: The run that is to continue.
        groups: Of the checkpoint, each with "params", the names of its parameters.
        last_epoch: Steps that the schedule of the learning rate has made.

    Raises:
        RegradError: If an option or a learning rate differs; says which, there and here.
    """
    optimizer = run.optimizer.optimizer
    options = inspect.signature(type(optimizer)).parameters.keys() - {"params", "lr"}
    model = run.accelerator.unwrap_model(run.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    factor = run.factor(last_epoch)
    base_rates = run.scheduler.scheduler.base_lrs
    for index, group in enumerate(optimizer.param_groups):
        old = group_of_names(groups, {names[parameter] for parameter in group["params"]})
        if old is None:
            continue  # refused when the optimizer takes its state
        for key in sorted(options & group.keys()):
            if not _same(old.get(key), group[key]):
                raise RegradError(
                    f"checkpoint must have the optimizer of this run, "
                    f"got {key} {shown(old.get(key))} there and {shown(group[key])} here "
                    f"in group {index}"
                )
        base = base_rates[index]
        for key, rate in (("lr", base * factor), ("initial_lr", base)):
            if not math.isclose(old.get(key, math.nan), rate, rel_tol=1e-9):
                raise RegradError(
                    f"checkpoint must have the learning rates of this run, "
                    f"got {key} {shown(old.get(key))} there and {rate!r} here in group {index}"
                )


def _check_same(wanted: Mapping[str, str], got: Mapping[str, str], what: str) -> None:
    """Raise a `RegradError` that says how many entries differ, and the first of them."""
    names = {**wanted, **got}
    differing = [name for name in names if wanted.get(name, ABSENT) != got.get(name, ABSENT)]
    if not differing:
        return
    first = differing[0]
    others = f" and {len(differing) - 1} more that differ" if len(differing) > 1 else ""
    raise RegradError(
        f"checkpoint must hold the tensors {what}, got {got.get(first, ABSENT)} for '{first}' "
        f"instead of {wanted.get(first, ABSENT)}{others}"
    )


def _tensors(value: Any, way: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries and lists, each with its way there."""
    if isinstance(value, Tensor):
        yield way, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _tensors(item, f"{way}/{key}" if way else str(key))


def _form(tensor: Tensor) -> str:
    """Return number format and shape of a tensor in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _same(one: Any, other: Any) -> bool:
    """Say whether two values of an option are equal; either may be a tensor."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))
    return bool(one == other)
