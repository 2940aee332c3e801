"""The comparison: every arm on every seed, kept run by run."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from regrad_runner.arms import Arm, expand
from regrad_runner.config import FIRST_TUNING_SEED, CompareConfig
from regrad_runner.effects import FILE as EFFECTS
from regrad_runner.effects import Effect, EffectTrace, keep_effects
from regrad_runner.nonfinite import keeping_norms
from regrad_runner.preparation import default_folder, every_correction, example_optimizer, load_data, try_on
from regrad_runner.probing import FILE, Probe, Quality, check_probing, keep_qualities
from regrad_runner.progress import Display
from regrad_runner.report import draw
from regrad_runner.results import (
    Result,
    ResultsFolder,
    Trial,
    check_arms,
    check_folder,
    finished_result,
    read_about,
    start_folder,
    write_whole,
)
from regrad_runner.stopping import tracked
from regrad_runner.surroundings import surroundings
from regrad_runner.tracking import Run, Tracker, open_tracker
from regrad_runner.training import Point, TrainingRun, make_accelerator, name_on_validation
from regrad_runner.workloads import Workload

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A comparison that was checked and can start.

    Attributes:
        config: Resolved settings.
        workload: What is trained.
        arms: What is compared.
        path: Folder to write.
        reports: Whether this is the process that writes and prints.
        processes: How many there are.
        left_out: Installed corrections that cannot work here, with the reason, where all were asked for.
    """

    config: CompareConfig
    workload: Workload
    arms: tuple[Arm, ...]
    path: Path
    reports: bool
    processes: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """Runs in all, those of the choice of learning rates among them."""
        return len(self.trials) + len(self.arms) * self.config.seeds

    def in_words(self) -> str:
        """Say what will be done."""
        config, images = self.config, len(self.workload.train)
        tuning = f" after {len(self.trials)} runs to choose learning rates" if self.trials else ""
        lines = (
            f"{self.workload.name}, {images:,} training images: {len(self.arms)} arms × {config.seeds} seeds{tuning}",
            f"{config.model}, {config.epochs} epochs, {config.optimizer}; writing {self.path}",
            *(f"left out: {name} ({why})" for name, why in self.left_out.items()),
        )
        return "\n".join(lines)

    @property
    def experiment(self) -> str:
        """Name of the group of tracked runs."""
        return f"regrad {self.workload.name}"

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from."""
        return self.config.lr or ()

    @property
    def trials(self) -> list[tuple[Arm, float, int]]:
        """Runs of the choice of learning rates: as many for every arm, on seeds that are not compared on."""
        if len(self.rates) == 1:
            return []
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.config.tuning_seeds)
        return list(product(self.arms, self.rates, seeds))


def make_plan(config: CompareConfig, *, out: Path | None = None, resume: bool = False) -> Plan:
    """Check everything that can be checked before the first step. Writes nothing.

    Args:
        config: Settings; what is None is filled in from the workload.
        out: Folder to write; None for a new one in the current folder.
        resume: Whether to continue the comparison that is in `out`.

    Raises:
        ValueError: If anything is unknown, missing or does not fit.
        RegradError: If corrections cannot work together, or not on this model and optimizer.
    """
    workload, config = load_data(config)
    accelerator = make_accelerator(config)
    check_probing(config, processes=accelerator.num_processes, samples=len(workload.train))
    path = out or default_folder("", config.workload)
    lr = (config.lr or (0.0,))[0]
    config, left_out = every_correction(config, workload, lr=lr)
    if accelerator.is_main_process:
        config = check_folder(path, config, resume=resume)
    config = agreed(config)
    arms = expand(config.corrections, example_optimizer(config, lr=lr), controls=config.controls)
    if accelerator.is_main_process and resume:
        check_arms(path, arms)
        left_out = read_about(path).get("left_out", {}) | left_out
        left_out = {name: why for name, why in left_out.items() if name not in config.corrections}
    for arm in arms:
        try_on(arm, config, workload, lr=lr)
    return Plan(config, workload, tuple(arms), path, accelerator.is_main_process, accelerator.num_processes, left_out)


def compare(plan: Plan, display: Display) -> ResultsFolder:
    """Run what is not finished yet; after every run the folder holds it.

    A run that fails is kept as failed and the others go on. On several processes each run is data-parallel, the
    first process writes, and a failure ends them all.

    Args:
        plan: From `make_plan`.
        display: Told what is under way.

    Returns:
        The folder with every run.
    """
    tracker, folder = Tracker(), ResultsFolder(plan.path)
    if plan.reports:
        about = {"kind": "comparison", "workload": plan.workload.name, "measure": asdict(plan.workload.measure)}
        about |= {"left_out": dict(plan.left_out), "arms": {arm.name: arm.recipe for arm in plan.arms}}
        about |= surroundings(processes=plan.processes, earlier=read_about(plan.path))
        folder = start_folder(plan.path, plan.config, about)
        folder.name_anew(plan.arms)
        tracker = open_tracker(plan.config.tracker, folder=plan.path, uri=plan.config.tracking_uri)
    settings = plan.config.model_dump(mode="json")
    with tracker, tracked(lambda: tracker.start(plan.experiment, plan.path.name, settings)) as parent:
        comparison = Comparison(plan, folder, tracker, parent, display)
        display.skip(len(folder.trials) + sum(result.status == "finished" for result in folder.results))
        rates = comparison.choose_rates()
        pending = [(a, s) for s, a in product(range(plan.config.seeds), plan.arms) if not folder.is_finished(a.name, s)]
        for arm, seed in agreed(pending):
            comparison.run(arm, seed=seed, lr=rates[arm.name])
        if plan.reports:
            more = [path for name in (FILE, EFFECTS) if (path := plan.path / name).is_file()]
            for path in [plan.path / "results.csv", *more, *draw(folder, plan.workload.measure)]:
                parent.artifact(path)
        if any(result.status == "failed" for result in folder.results):
            parent.finish("FAILED")
    return folder


class Comparison:
    """A comparison under way.

    Args:
        plan: What to do.
        folder: What was done.
        tracker: Where runs are shown.
        parent: The tracked run that stands for the comparison.
        display: Told what is under way.
    """

    def __init__(self, plan: Plan, folder: ResultsFolder, tracker: Tracker, parent: Run, display: Display) -> None:
        self.plan, self.folder, self.tracker, self.parent, self.display = plan, folder, tracker, parent, display

    def choose_rates(self) -> dict[str, float]:
        """Return each arm's learning rate: the best mean of its trials, by the validation images at their end."""
        tried = {(trial.arm, trial.lr, trial.seed) for trial in self.folder.trials}
        for arm, lr, seed in agreed([t for t in self.plan.trials if (t[0].name, *t[1:]) not in tried]):
            self._try_rate(arm, lr=lr, seed=seed)
        sign = 1 if self.plan.workload.measure.higher_is_better else -1

        def score(arm: Arm, lr: float) -> float:
            values = [trial.validation for trial in self.folder.trials if (trial.arm, trial.lr) == (arm.name, lr)]
            return sign * fmean(values) if values and all(map(math.isfinite, values)) else -math.inf

        rates = {arm.name: max(self.plan.rates, key=lambda lr: score(arm, lr)) for arm in self.plan.arms}
        return agreed(rates)

    def run(self, arm: Arm, *, seed: int, lr: float) -> None:
        """Run one arm on one seed and keep what came out."""
        name, points, qualities = f"{arm.name}, seed {seed}", list[Point](), list[Quality]()
        effects = list[Effect]()
        result = Result(arm=arm.name, seed=seed, status="failed", lr=lr, must_beat=arm.must_beat)
        result = replace(result, control=arm.control is not None)
        outcome = "failed"
        with self._alone(name), self._tracked(name, arm, seed=seed, lr=lr) as shown:
            started = time.perf_counter()
            with closing(TrainingRun(self.plan.config, self.plan.workload, arm, seed=seed, lr=lr)) as run:
                self._train(run, name, shown, qualities, effects)
                points = run.position.points
                result = finished_result(run, result, started=started)
                self._keep_receipt(run, result, shown)
            outcome = self._in_words(result)
        if self.plan.reports:
            keep_qualities(self.folder, qualities if points else [])
            keep_effects(self.folder, effects if points else [])
            self.folder.add(result, points)
        self.display.end(f"{name}: {outcome}")

    def _try_rate(self, arm: Arm, *, lr: float, seed: int) -> None:
        """Run a trial; one that fails says that this learning rate is not the one to choose."""
        name = f"{arm.name}, lr {lr:g}, trial {seed - FIRST_TUNING_SEED + 1}"
        validation = math.nan
        with (
            self._alone(name),
            self._tracked(name, arm, seed=seed, lr=lr, trial=True) as shown,
            closing(TrainingRun(self.plan.config, self.plan.workload, arm, seed=seed, lr=lr)) as run,
        ):
            self._train(run, name, shown)
            validation = run.position.points[-1].value
        if self.plan.reports:
            self.folder.add_trial(Trial(arm=arm.name, lr=lr, seed=seed, validation=validation))
        self.display.end(f"{name}: {name_on_validation(self.plan.workload.measure)} {validation:.4f}")

    def _train(
        self,
        run: TrainingRun,
        name: str,
        shown: Run,
        qualities: list[Quality] | None = None,
        effects: list[Effect] | None = None,
    ) -> None:
        """Train to the end; where there are lists, keep effects and, if that was asked for, gradient quality."""
        config, probe, trace = self.plan.config, None, EffectTrace(run)
        if qualities is not None and config.probe_every is not None:
            probe = Probe(run, every=config.probe_every, size=config.probe_size)

        def keep(point: Point) -> None:
            shown.log(point.step, point.as_metrics(self.plan.workload.measure))
            if effects is not None:
                effects.extend(trace.look())

        def end_step(step: int) -> None:
            self.display.step(step)
            quality = probe.finish_step() if probe is not None else None
            if quality is not None and qualities is not None:
                qualities.append(quality)
                shown.log(step, quality.as_metrics())

        self.display.begin(name, steps=run.total_steps)
        folder = partial(self.folder.run_folder, run.arm, run.seed)
        with keeping_norms(folder, shown, writes=self.plan.reports):
            run.train(on_point=keep, on_step=end_step)

    def _tracked(self, name: str, arm: Arm, *, trial: bool = False, **params: float) -> AbstractContextManager[Run]:
        change = {"control": arm.control} if arm.control else {}
        about = {"arm": arm.name, "corrections": " ".join(arm.corrections), "trial": trial, **params, **change}
        return tracked(lambda: self.tracker.start(self.plan.experiment, name, about, parent=self.parent))

    def _keep_receipt(self, run: TrainingRun, result: Result, shown: Run) -> None:
        if not self.plan.reports:
            return
        path = self.folder.run_folder(run.arm, result.seed) / "receipt.json"
        write_whole(path, json.dumps(run.receipt(), indent=2) + "\n")
        shown.artifact(path)
        shown.log(result.steps, run.metrics() | {self.plan.workload.measure.name: result.value})

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep a failure inside its run: noted, and the next run starts. On several processes it ends them all."""
        try:
            yield
        except Exception as problem:
            if self.plan.processes > 1:
                raise
            reason = str(problem).partition("\n")[0]
            self.display.say(f"{name} failed: {type(problem).__name__}: {reason}")
            with (self.plan.path / "failures.txt").open("a", encoding="utf-8") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")

    def _in_words(self, result: Result) -> str:
        measure = self.plan.workload.measure
        words = [f"{measure.name} {result.value:.4f}"]
        if measure.target is not None:
            reached = "missed" if result.steps_to_target is None else f"after {result.steps_to_target} steps"
            words.append(f"{measure.target:g} {reached}")
        return ", ".join([*words, f"{result.seconds:.1f} s"])


def agreed(value: T) -> T:
    """Return the first process's value."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
