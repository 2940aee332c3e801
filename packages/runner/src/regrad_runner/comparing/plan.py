"""What a comparison will do, checked before anything is written, and the folder for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from regrad_runner.diagnostics.gradient_quality import check_probing
from regrad_runner.results.about import read_about
from regrad_runner.results.cells import Cell, Extension, cells_of, is_compared
from regrad_runner.results.folder import ResultsFolder, check_arms, check_folder, start_folder
from regrad_runner.results.machine import surroundings, usable_cores
from regrad_runner.settings.arms import Arm, expand
from regrad_runner.settings.cluster import SLURM, Cluster
from regrad_runner.settings.config import MOST_THREADS, CompareConfig, ComparisonSettings
from regrad_runner.settings.engine import refuse_deepspeed
from regrad_runner.settings.environment import environment_in_words
from regrad_runner.training.preparation import (
    default_folder,
    every_correction,
    example_optimizer,
    load_data,
    try_on,
)
from regrad_runner.training.processes import check_task, make_accelerator, on_first_process
from regrad_runner.workloads.workload import Measure, Workload

Agreed = TypeVar("Agreed")
SettingsOfComparison = TypeVar("SettingsOfComparison", bound=ComparisonSettings)


class Planned(ABC, Generic[SettingsOfComparison]):
    """A comparison that was checked and can start, of whatever its runs are.

    Attributes:
        config: Resolved settings.
        arms: What is compared.
        path: Folder to write.
        reports: Whether this is the process that writes and prints.
        processes: How many there are.
        left_out: Installed corrections that cannot work here, with the reason, where all were
            requested.
        jobs: How many runs take place at once, each in a process of its own.
        cluster: The queue in which runs are jobs; None if this command runs them.
    """

    config: SettingsOfComparison
    arms: tuple[Arm, ...]
    path: Path
    reports: bool
    processes: int
    left_out: Mapping[str, str]
    jobs: int
    cluster: Cluster | None

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """By what runs are compared."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of what is trained."""

    @property
    @abstractmethod
    def samples(self) -> str:
        """What samples are called; empty if unknown."""

    @property
    def script_sha256(self) -> str:
        """Of the file of a script that is trained; nothing if there is none."""
        return ""

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each split has; empty if unknown."""
        return {}

    @abstractmethod
    def in_words(self) -> str:
        """Say what will be done."""

    @property
    def cells(self) -> list[Cell | Extension]:
        """All runs, and the numbers kept for trials of further rates; see `cells_of`."""
        return cells_of([arm.name for arm in self.arms], self.config)

    @property
    def runs(self) -> int:
        """How many runs there are in any case: trials of further rates may be added."""
        return sum(isinstance(cell, Cell) for cell in self.cells)

    @property
    def experiment(self) -> str:
        """Name of the group of tracked runs."""
        return f"regrad {self.name}"

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def runs_in_words(self) -> str:
        """Say how many runs there are."""
        said = f"{len(self.arms)} arms × {self.config.seeds} seeds"
        trials = self.runs - sum(map(is_compared, self.cells))
        if trials:
            or_more = " or more" if self.config.tuning_extensions else ""
            said = f"{said} after {trials} runs{or_more} to choose learning rates"
        return f"{said}{self._at_once_in_words()}"

    def _at_once_in_words(self) -> str:
        """Say how many runs there are at once, and where."""
        if self.cluster is not None and self.cluster.place == SLURM:
            most = self.cluster.array_parallelism
            return ", as jobs of SLURM" if most is None else f", as jobs of SLURM, {most} at once"
        return f", {self.jobs} at once" if self.jobs > 1 else ""


@dataclass(frozen=True)
class Plan(Planned[CompareConfig]):
    """A comparison on a workload.

    Attributes:
        workload: What is trained. The others are as in `Planned`.
    """

    config: CompareConfig
    workload: Workload
    arms: tuple[Arm, ...]
    path: Path
    reports: bool
    processes: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    jobs: int = 1
    cluster: Cluster | None = None

    @property
    def measure(self) -> Measure:
        """By what runs are compared."""
        return self.workload.measure

    @property
    def name(self) -> str:
        """Of the workload."""
        return self.workload.name

    @property
    def samples(self) -> str:
        """What its samples are called."""
        return self.workload.train.kind

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each split has."""
        return self.workload.sizes

    def in_words(self) -> str:
        """Say what will be done."""
        config = self.config
        lines = [
            f"{self._data_in_words()}: {self.runs_in_words()}",
            f"{config.model}, {config.epochs} epochs, {config.optimizer}; writing {self.path}",
        ]
        defaults = self.workload.defaults
        if defaults.reason and config.model == defaults.model:
            lines.append(defaults.reason)
        lines += [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        lines += environment_in_words(config)
        return "\n".join(lines)

    def _data_in_words(self) -> str:
        train = self.workload.train
        return f"{self.workload.name}, {len(train):,} training {train.kind}"


def make_plan(
    config: CompareConfig, *, out: Path | None = None, resume: bool = False, jobs: int | None = 1
) -> Plan:
    """Check everything that can be checked before the first step. Writes nothing.

    Args:
        config: Settings; what is None is filled in from the workload.
        out: Folder to write; None for a new one in the current folder.
        resume: Whether to continue the comparison that is in `out`.
        jobs: How many runs to have at once, each in a process of its own; None for as many as
            there are CPU cores, but one with an accelerator device or on several processes.

    Raises:
        ValueError: If anything is unknown, missing or does not fit.
        RegradError: If corrections cannot work together, or not on this model and optimizer.
    """
    given_jobs = 1 if jobs is None else jobs
    if not 1 <= given_jobs <= MOST_THREADS:
        raise ValueError(f"jobs must be from 1 to {MOST_THREADS}, got {jobs}")
    shares_threads = config.threads is None and given_jobs > 1
    workload, config = load_data(config)
    if shares_threads:
        share = max(1, (config.threads or 1) // given_jobs)
        config = config.model_copy(update={"threads": share})
    check_task()
    refuse_deepspeed("regrad compare")
    accelerator = make_accelerator(config)
    processes = accelerator.num_processes
    is_first = accelerator.is_main_process
    if given_jobs > 1 and processes > 1:
        raise ValueError(f"jobs must be 1 on several processes, got {jobs} on {processes}")
    check_probing(config, processes=processes, samples=len(workload.train))
    path = out or default_folder("", workload.name)
    lr = _first_rate(config)
    config, left_out = every_correction(config, workload, lr=lr)
    asked = config
    config = on_first_process(accelerator, lambda: check_folder(path, asked, resume=resume))
    arms = expand(config.corrections, example_optimizer(config, lr=lr), controls=config.controls)
    if is_first and resume:
        check_arms(path, arms)
        left_out = still_left_out(path, config, left_out)
    for arm in arms:
        try_on(arm, config, workload, lr=lr)
    plan = Plan(config, workload, tuple(arms), path, is_first, processes, left_out, given_jobs)
    return plan if jobs is not None else replace(plan, jobs=suitable_jobs(plan))


def suitable_jobs(plan: Planned[Any]) -> int:
    """Return how many runs of a plan to have at once where nobody said."""
    if plan.processes > 1 or torch.accelerator.is_available():
        return 1
    return min(usable_cores(), plan.runs, MOST_THREADS)


def _first_rate(config: CompareConfig) -> float:
    """Return a learning rate with which to try arms on."""
    return config.rates[0] if config.rates else 0.0


def still_left_out(
    path: Path, config: ComparisonSettings, now: Mapping[str, str]
) -> dict[str, str]:
    """Return what a resumed comparison leaves out, with the reasons.

    Args:
        path: Its folder, which says what was left out before.
        config: Its settings now; what they name is not left out any more.
        now: What is left out for the first time.
    """
    left_out = read_about(path).get("left_out", {}) | now
    return {name: why for name, why in left_out.items() if name not in config.corrections}


def plan_of(path: Path, config: CompareConfig) -> Plan:
    """Return the plan of a folder that was checked when it was started.

    Args:
        path: The folder.
        config: Its settings.

    Raises:
        ValueError: If the data are not there, or the arms are not the same as before.
    """
    workload, config = load_data(config)
    refuse_deepspeed("regrad compare")
    accelerator = make_accelerator(config)
    optimizer = example_optimizer(config, lr=_first_rate(config))
    arms = expand(config.corrections, optimizer, controls=config.controls)
    check_arms(path, arms)
    return Plan(
        config=config,
        workload=workload,
        arms=tuple(arms),
        path=path,
        reports=accelerator.is_main_process,
        processes=accelerator.num_processes,
    )


def open_folder(plan: Planned[Any], *, job_array: bool = False) -> ResultsFolder:
    """Make a plan's folder, or take up what is in it.

    Args:
        plan: Checked.
        job_array: Whether its cells are run by other commands.
    """
    earlier = read_about(plan.path)
    about = {
        "kind": "comparison",
        "workload": plan.name,
        "measure": asdict(plan.measure),
        "samples": plan.samples,
        "sizes": plan.sizes,
        "left_out": dict(plan.left_out),
        "arms": {arm.name: arm.recipe for arm in plan.arms},
        # For earlier runs too: corrections that were added may change what their arms are.
        "roles": {
            arm.name: {
                "must_beat": arm.must_beat,
                "control": arm.control is not None,
                "control_of": [*arm.control_of],
            }
            for arm in plan.arms
        },
        "job_array": job_array,
        **surroundings(processes=plan.processes, earlier=earlier),
    }
    digest = earlier.get("script_sha256") or plan.script_sha256
    if digest:
        about["script_sha256"] = digest
    start_folder(plan.path, plan.config, about)
    return ResultsFolder(plan.path)


def agreed(value: Agreed) -> Agreed:
    """Return the first process's value."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
