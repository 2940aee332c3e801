"""The plan of a comparison whose runs are runs of a script, seen once before they start."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regrad
from regrad.correction import Control

from regrad_runner.comparing.plan import Planned, still_left_out, suitable_jobs
from regrad_runner.results.about import read_about
from regrad_runner.results.folder import check_arms, check_folder
from regrad_runner.scripts.child import Child, Ending
from regrad_runner.scripts.running import check_script
from regrad_runner.settings.arms import (
    ALL,
    Arm,
    control_from_values,
    correction_arms,
    with_controls,
)
from regrad_runner.settings.cluster import Cluster
from regrad_runner.settings.config import MOST_THREADS
from regrad_runner.settings.script_config import ScriptConfig, filled_in
from regrad_runner.signals import stoppable
from regrad_runner.training.preparation import default_folder
from regrad_runner.workloads.workload import Measure

RUN = "regrad_runner"
PROBE = "regrad_runner.scripts.probing"
DECIMALS = 4


@dataclass(frozen=True)
class ScriptPlan(Planned[ScriptConfig]):
    """A comparison of a script with itself, corrected.

    Attributes:
        trained: What the script trains, in words; nothing if it was not looked at. The others
            are as in `Planned`.
    """

    config: ScriptConfig
    arms: tuple[Arm, ...]
    path: Path
    trained: str = ""
    jobs: int = 1
    reports: bool = True
    processes: int = 1
    left_out: Mapping[str, str] = field(default_factory=dict)
    cluster: Cluster | None = None

    @property
    def measure(self) -> Measure:
        """By what runs are compared."""
        name = self.config.source.name
        return Measure(
            name=name,
            higher_is_better=self.config.better == "higher",
            target=self.config.target,
            decimals=DECIMALS,
            on_validation=name,
        )

    @property
    def name(self) -> str:
        """Of the script."""
        return self.config.script_name

    @property
    def script_sha256(self) -> str:
        """Of the script's file; nothing for a module, which may be many files."""
        if self.config.script[0] == "-m":
            return ""
        with Path(self.config.script[0]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def samples(self) -> str:
        """What samples are called; only the script knows."""
        return ""

    def in_words(self) -> str:
        """Say what will be done."""
        lines = [
            f"{self.trained or self.name}: {self.runs_in_words()}",
            f"each runs: {shlex.join(self.config.script)}",
            f"writing {self.path}",
        ]
        lines += [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)


def make_script_plan(
    config: ScriptConfig, *, out: Path | None = None, resume: bool = False, jobs: int | None = None
) -> ScriptPlan:
    """Check everything that can be checked before the first run. Writes nothing of its own.

    The script is started once, up to its first training step, to see what it trains with.

    Args:
        config: Settings.
        out: Folder to write; None for a new one in the current folder.
        resume: Whether to continue the comparison that is in `out`.
        jobs: How many runs to have at once; None for as many as there are CPU cores, but one with
            an accelerator device. Each has one thread, unless something else is said.

    Raises:
        ValueError: If the script is not there, does not train, or anything does not fit.
        RegradError: If corrections cannot work together.
    """
    if jobs is not None and not 1 <= jobs <= MOST_THREADS:
        raise ValueError(f"jobs must be from 1 to {MOST_THREADS}, got {jobs}")
    check_script(config.script)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a script must be compared by one process, got several; pass the command that starts "
            "them to --launcher, such as --launcher 'torchrun --nproc-per-node 2'"
        )
    if config.threads is None:
        config = config.model_copy(update={"threads": 1})
    path = out or default_folder("", config.script_name)
    asks_for_all = ALL in config.corrections
    if not asks_for_all:  # fail early, before the script starts
        config = check_folder(path, config, resume=resume)
    arms, optional = _arms_to_try(config.corrections)
    seen = _look(config, arms)
    refused = seen["refused"]
    left_out = {name: why for name, why in refused.items() if name in optional}
    _check_none_is_refused({arm: why for arm, why in refused.items() if arm not in optional})
    arms = [arm for arm in arms if arm.name not in left_out]
    if asks_for_all:
        names = tuple(arm.name for arm in arms if arm.corrections)
        config = config.model_copy(update={"corrections": names})
        config = check_folder(path, config, resume=resume)
        arms = correction_arms(config.corrections)  # in the order of an earlier command
    controls = {arm: control_from_values(values) for arm, values in seen["controls"].items()}
    arms = with_controls(arms, controls, added=config.controls)
    impossible = {
        arm.name: seen["refused_controls"][arm.name]
        for arm in arms
        if arm.control is not None and arm.name in seen["refused_controls"]
    }
    left_out |= {f"the control {name}": why for name, why in impossible.items()}
    arms = [arm for arm in arms if arm.name not in impossible]
    if resume:
        check_arms(path, arms)
        left_out = still_left_out(path, config, left_out)
    trained = f"{config.script_name}, {seen['optimizer']} on {' and '.join(seen['modules'])}"
    plan = ScriptPlan(config, tuple(arms), path, trained, jobs or 1, left_out=left_out)
    return plan if jobs is not None else replace(plan, jobs=suitable_jobs(plan))


def script_plan_of(path: Path, config: ScriptConfig) -> ScriptPlan:
    """Return the plan of a folder that was checked when it was started.

    Args:
        path: The folder, which says what its arms are.
        config: Its settings.

    Raises:
        ValueError: If the script is not there.
    """
    check_script(config.script)
    about = read_about(path)
    known = {arm.name: arm for arm in correction_arms(config.corrections)}
    arms = []
    for name, role in about.get("roles", {}).items():
        arm = known.get(name, Arm(name, control_of=tuple(role.get("control_of", ()))))
        if role["control"]:
            arm = Arm(name, control=_control_in(about, name), control_of=arm.control_of)
        arms.append(arm)
    return ScriptPlan(config, tuple(arms), path)


def command_of(config: ScriptConfig, module: str, words: Sequence[str]) -> list[str]:
    """Return the command that runs a module of ours as the script is run, behind its launcher."""
    if config.launcher is None:
        return [sys.executable, "-m", module, *words]
    return [*shlex.split(config.launcher), "-m", module, *words]


def script_words(config: ScriptConfig, values: Mapping[str, str]) -> list[str]:
    """Return the script with its arguments, with everything in braces filled in."""
    return [filled_in(word, values) for word in config.script]


def environment_of(config: ScriptConfig) -> dict[str, str]:
    """Return the variables of a run's process."""
    variables = dict(os.environ)
    variables["PYTHONUNBUFFERED"] = "1"  # so that its output is there if a signal ends it
    if config.threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    return variables


def _control_in(about: Mapping[str, Any], name: str) -> Control:
    """Return what a folder says of a control's change.

    Raises:
        ValueError: If it says nothing of it, or something else.
    """
    recipe = about.get("arms", {}).get(name, {})
    try:
        return control_from_values({"name": name, **recipe})
    except TypeError as problem:
        raise ValueError(
            f"about.json must say what the control {name!r} changes, got {problem}; take it from "
            "a copy of the folder"
        ) from None


def _arms_to_try(corrections: Sequence[str]) -> tuple[list[Arm], set[str]]:
    """Return the arms to try on the script, and the names of those that "all" stands for.

    Where one of these does not fit, it is left out.
    """
    if ALL not in corrections:
        return correction_arms(corrections), set()
    installed = [name for name in regrad.available() if name not in corrections]
    place = corrections.index(ALL)
    after = [text for text in corrections[place:] if text != ALL]
    return correction_arms([*corrections[:place], *installed, *after]), set(installed)


def _check_none_is_refused(refused: Mapping[str, str]) -> None:
    """Raise a `ValueError` that names every correction which does not fit."""
    if refused:
        reasons = "; ".join(f"{arm!r}: {why}" for arm, why in refused.items())
        raise ValueError(f"corrections must fit what the script trains, got {reasons}")


def _look(config: ScriptConfig, arms: Sequence[Arm]) -> dict[str, Any]:
    """Run the script up to its first training step and return what was seen there."""
    with tempfile.TemporaryDirectory(prefix="regrad-") as name:
        folder = Path(name)
        question = folder / "question.json"
        answer = folder / "answer.json"
        out = folder / "out"
        out.mkdir()
        asked = {
            "arms": {arm.name: [*arm.corrections] for arm in arms},
            "classes": [*config.optimizer_class],
        }
        question.write_text(json.dumps(asked), encoding="utf-8")
        values = {"seed": "0", "lr": f"{config.rates[0]:.12g}", "out": str(out), "arm": "probe"}
        words = [str(question), str(answer), "--", *script_words(config, values)]
        child = Child(
            command_of(config, PROBE, words),
            environment=environment_of(config),
            output=folder / "output.txt",
        )
        with stoppable():  # a signal that ends this process must end the script
            ending = child.run(config.timeout)
        seen = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "controls" not in seen:
        raise ValueError(_why_not_seen(config, ending, seen))
    return seen


def _why_not_seen(config: ScriptConfig, ending: Ending, seen: Mapping[str, Any]) -> str:
    """Say why a script did not come to a training step."""
    rule = "script must train with a torch optimizer in its own process"
    if ending.timed_out:
        return f"{rule}, got no training step within {config.timeout:g} s; raise --timeout"
    if ending.code != 0:
        return f"{rule}, got none: {ending.in_words}: {ending.reason}"
    reasons = seen.get("not_attached") or ["it created none"]
    return f"{rule}, got none: {reasons[0]}"
