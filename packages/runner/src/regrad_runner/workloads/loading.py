"""Workloads by name, and their models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import regrad
from regrad import PluginLoadError
from torch import nn

from regrad_runner.settings.specs import check_options, parameters_of, read_spec
from regrad_runner.workloads.samples import Samples
from regrad_runner.workloads.workload import MOST_DECIMALS, Measure, Workload

WORKLOADS_GROUP = "regrad.workloads"
# Arguments of a workload's function and of its models that are settings, not options of a name.
OF_DATA = ("seed_of_split", "data_dir", "train_size", "download", "image_size")
OF_MODELS = ("name", "seed", "width", "norm")


def load_workload(
    spec: str,
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    download: bool = False,
    image_size: int | None = None,
) -> Workload:
    """Load a workload by its name among the entry points of group `regrad.workloads`.

    An entry point is a function with these keyword arguments that returns a `Workload`. It may
    leave out the last two, which are then refused, and have others, which are options of the name:
    "text:context=256".

    Args:
        spec: Name such as "digits" or "cifar10", with options or without.
        seed_of_split: Fixes which samples are for training and which for validation, at least 0.
        data_dir: Folder or file with the data, for workloads that need one.
        train_size: Number of training samples to keep; None for all.
        download: Whether missing data may be fetched from where they are published.
        image_size: Height and width to give the images, in pixels; None for what suits them.

    Returns:
        The workload, its data in memory unless they are large.

    Raises:
        ValueError: If no workload has this name, or its data or options are missing or unfit: one
            line each.
        PluginLoadError: If its distribution cannot be imported, fails, or returns no workload that
            can be trained.
    """
    name, options = read_spec(spec, "workload")
    load = regrad.load(name, group=WORKLOADS_GROUP)
    check_options(load, options, what=f"workload {name!r}", settings=OF_DATA)
    arguments: dict[str, Any] = {
        "seed_of_split": seed_of_split,
        "data_dir": data_dir,
        "train_size": train_size,
        **options,
    }
    # A workload's function may omit these two.
    for setting, value in (("download", download), ("image_size", image_size)):
        if not value:
            continue
        if setting not in parameters_of(load):
            raise ValueError(f"{setting} must be left out for workload {name!r}, got {value!r}")
        arguments[setting] = value
    entry = regrad.available(WORKLOADS_GROUP)[name]
    return _make(load, arguments, f"workload {name!r} ({entry.distribution} {entry.version})")


def make_model(
    workload: Workload, spec: str, *, width: int | None, norm: str | None, seed: int
) -> nn.Module:
    """Return a workload's model by its name with options.

    Args:
        workload: Whose `build_model` is called.
        spec: Name with options or without.
        width: The setting; None if the model has none.
        norm: As `width`.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If the model is unknown, or an option or setting does not fit.
    """
    name, options = read_spec(spec, "model")
    check_options(workload.build_model, options, what=f"model {name!r}", settings=OF_MODELS)
    settings: dict[str, Any] = {}
    if width is not None:
        settings["width"] = width
    if norm is not None:
        settings["norm"] = norm
    return workload.build_model(name, seed=seed, **settings, **options)


def settings_of_model(workload: Workload, spec: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `width` and `norm` as they will be: as given, or what suits the model.

    Raises:
        ValueError: If one is given that no model of this workload takes.
    """
    name, _ = read_spec(spec, "model")
    suitable = workload.model_settings(name)
    taken = parameters_of(workload.build_model)
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if value is not None and key not in taken:
            raise ValueError(
                f"{key} must be left out for workload {workload.name!r}, got {value!r}"
            )
        settings[key] = suitable.get(key) if value is None else value
    return settings


def _make(load: Callable[..., Any], arguments: Mapping[str, Any], whose: str) -> Workload:
    """Return what a workload's function makes.

    What it finds unfit is a `ValueError` or `PluginLoadError` of its own; all else is its fault.
    """
    try:
        made = load(**arguments)
    except (ValueError, PluginLoadError):
        raise
    except Exception as problem:
        raise PluginLoadError(f"{whose} failed: {type(problem).__name__}: {problem}") from problem
    misfit = _misfit(made)
    if misfit:
        raise PluginLoadError(f"{whose} {misfit}")
    return made  # type: ignore[no-any-return]


def _misfit(made: Any) -> str:
    """Say why something cannot be trained; nothing if it can."""
    if not isinstance(made, Workload):
        return f"must return a Workload, got {type(made).__name__}"
    for method in ("build_model", "score"):
        if getattr(type(made), method) is getattr(Workload, method):
            return f"must return a Workload that implements {method}, got {type(made).__name__}"
    if not isinstance(made.measure, Measure) or not made.measure.is_whole:
        return f"must have a Measure with decimals from 0 to {MOST_DECIMALS}, got {made.measure!r}"
    for split in ("train", "validation", "test"):
        samples = getattr(made, split)
        if not isinstance(samples, Samples) or not len(samples):
            return f"must have Samples in {split}, got {type(samples).__name__}"
    return ""
