"""Runs of a comparison of scripts: each a process of its own, several at once."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, Self

from regrad_runner.addresses import without_secrets
from regrad_runner.comparing.running import record_values
from regrad_runner.comparing.script_pairs import Pairs
from regrad_runner.comparing.script_plan import (
    RUN,
    ScriptPlan,
    command_of,
    environment_of,
    script_words,
)
from regrad_runner.errors import DiskError, in_one_line
from regrad_runner.files import append, make_folder, remove_folder
from regrad_runner.reporting.progress import Display
from regrad_runner.results.cells import Cell
from regrad_runner.results.outcomes import Result, numbers_of
from regrad_runner.results.points import EVALUATION, Point, steps_to_target
from regrad_runner.results.run import (
    OUTPUT,
    RECEIPT,
    RunLog,
    RunWriter,
    as_json_text,
    begin_run,
    now,
)
from regrad_runner.scripts.child import Child, Ending
from regrad_runner.scripts.command import NOTHING_ATTACHED
from regrad_runner.scripts.measures import Measured, OutputReader, curve_in_file
from regrad_runner.settings.arms import Arm, control_as_values
from regrad_runner.tracking.of_scripts import ScriptRuns

OUT = "out"
SAYS_FIRST = "regrad: not attached: "
# Time for the signal that ended a run to arrive here too, if it was sent to all processes.
SECONDS_FOR_A_SIGNAL = 1.0


class RunFailedError(Exception):
    """A run of a script came to nothing; says why, and what to do."""


class ScriptCells:
    """Runs cells as processes, as a context manager: they end with it.

    Args:
        plan: Of the comparison; its folder is there.
        display: Shows what is under way.
    """

    def __init__(self, plan: ScriptPlan, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._children: set[Child] = set()
        self._under_way: list[str] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._pairs = Pairs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()

    def run_cells(self, todo: Sequence[tuple[Cell, float]]) -> Iterator[Cell]:
        """Run cells at the same time; see `running.Runner`."""
        with ThreadPoolExecutor(self._plan.jobs) as pool:
            started = {pool.submit(self.run_cell, cell, lr=lr): cell for cell, lr in todo}
            try:
                for ended in as_completed(started):
                    ended.result()
                    yield started[ended]
            except BaseException:
                for waiting in started:
                    waiting.cancel()
                self._end_all()
                raise

    def run_cell(self, cell: Cell, *, lr: float) -> None:
        """Run a cell in its own folder; a failure is an outcome too.

        Args:
            cell: To run.
            lr: Its learning rate; 0 where the script takes none.
        """
        values = script_values(self._plan, cell, lr=lr)
        self._show(cell.name, begins=True)
        try:
            with begin_run(self._plan.path, values) as record:
                self._run(cell, record, lr)
        except DiskError:  # not the run's own failure, and those that follow would meet it too
            raise
        except (RunFailedError, OSError, ValueError) as problem:
            reason = without_secrets(in_one_line(problem))
            if not self._over.is_set():
                self._display.say(f"{cell.name} failed: {reason}")
                append(self._plan.path / "failures.txt", f"{cell.name}\n{reason}\n\n")
        finally:
            self._show(cell.name, begins=False)

    def _run(self, cell: Cell, record: RunWriter, lr: float) -> None:
        """Run the script once, and keep what came out."""
        plan = self._plan
        arm = plan.arm(cell.arm)
        out = _new_folder(record.path, OUT)
        values = {
            "seed": str(cell.seed),
            "lr": f"{lr:.12g}",
            "out": str(out.resolve()),
            "arm": cell.arm,
        }
        source = plan.config.source
        reader = OutputReader(source.key) if source.kind == "output" else None
        started = now()

        def hear(line: str) -> None:
            if reader is not None:
                for seen in reader.hear(line):
                    _keep(record, seen, seconds=(seen.time - started) / 1000)

        runs = ScriptRuns(plan.path, plan.config.tracking_uri, plan.experiment, record.record.id)
        environment = environment_of(plan.config)
        if source.kind == "mlflow":
            environment |= runs.environment()
        with tempfile.TemporaryDirectory(prefix="regrad-") as name:
            receipt_file = Path(name) / RECEIPT
            words = [
                *_flags(plan, arm, cell.seed),
                *("--receipt", str(receipt_file)),
                "--",
                *script_words(plan.config, values),
            ]
            child = Child(
                command_of(plan.config, RUN, ["run", *words]),
                environment=environment,
                output=record.path / OUTPUT,
                hear=hear,
            )
            ending = self._run_child(child)
            if self._is_stopped(ending):
                record.let_go()
                return
            receipt = _read_receipt(receipt_file, arm)
        curve = reader.seen if reader is not None else []
        if source.kind == "mlflow":
            curve = [
                Measured(point.step, point.value, point.time) for point in runs.curve(source.key)
            ]
        elif source.file:
            curve = curve_in_file(source, values, out)
        if reader is None:
            for seen in curve:
                _keep(record, seen)
        self._end_run(cell, record, ending, curve, receipt, lr=lr)

    def _run_child(self, child: Child) -> Ending:
        with self._lock:
            self._children.add(child)
        try:
            if self._over.is_set():
                child.end()
            return child.run(self._plan.config.timeout)
        finally:
            with self._lock:
                self._children.discard(child)

    def _is_stopped(self, ending: Ending) -> bool:
        """Say whether a run ended because the comparison ends."""
        if ending.code in (-signal.SIGINT, -signal.SIGTERM) and not ending.timed_out:
            return self._over.wait(SECONDS_FOR_A_SIGNAL)
        return self._over.is_set()

    def _end_run(
        self,
        cell: Cell,
        record: RunWriter,
        ending: Ending,
        curve: Sequence[Measured],
        receipt: dict[str, Any],
        *,
        lr: float,
    ) -> None:
        """Keep the result and the receipt, or raise `RunFailedError`."""
        diverged = bool(curve) and not math.isfinite(curve[-1].value)
        if ending.code == NOTHING_ATTACHED:
            diverged = False
        if not diverged:
            self._check(record, ending, curve)
        start = receipt["script"]["start"] if receipt else None
        warning = self._pairs.add(cell, start, [seen.value for seen in curve])
        if warning is not None:
            self._display.say(warning)
        if receipt:
            record.keep(RECEIPT, as_json_text(receipt))
        status: Literal["diverged", "finished"] = "diverged" if diverged else "finished"
        value = None if diverged else curve[-1].value
        if cell.lr is not None:
            record.end(status, result=None if diverged else {"validation": value})
            return
        points = [
            Point(step=seen.step, epoch=None, loss=None, value=seen.value, lr=None)
            for seen in curve
        ]
        result = Result(
            arm=cell.arm,
            seed=cell.seed,
            value=value,
            validation=value,
            steps=_steps(receipt),
            steps_to_target=steps_to_target(points, self._plan.measure),
            seconds=ending.seconds,
            touched=_touched(receipt),
            lr=lr,
        )
        record.end(status, result=numbers_of(result))

    def _check(self, record: RunWriter, ending: Ending, curve: Sequence[Measured]) -> None:
        """Raise `RunFailedError` if a run came to nothing."""
        where = f"its output is in {record.path / OUTPUT}"
        last = ending.reason
        if ending.timed_out:
            raise RunFailedError(f"{ending.in_words} (--timeout); {where}")
        if ending.code == NOTHING_ATTACHED:
            reasons = [line for line in ending.last_lines if line.startswith(SAYS_FIRST)]
            reason = reasons[0].removeprefix(SAYS_FIRST) if reasons else last
            raise RunFailedError(f"nothing was corrected: {reason}; {where}")
        if ending.code != 0:
            advice = ""
            if "EOFError" in last:
                advice = "; it read its standard input, which is empty here"
            elif ending.code < 0:
                advice = "; perhaps memory ran out"
            raise RunFailedError(f"{ending.in_words}: {last}{advice}; {where}")
        if not curve:
            source = self._plan.config.source
            raise RunFailedError(f"it gave no {source.name}: {source.in_words}; {where}")

    def _show(self, name: str, *, begins: bool) -> None:
        """Tell the display which cells are under way."""
        with self._lock:
            if begins:
                self._under_way.append(name)
            else:
                self._under_way.remove(name)
            if self._under_way:
                self._display.begin("; ".join(self._under_way), steps=None)

    def _end_all(self) -> None:
        """End every process that still runs."""
        with self._lock:
            self._over.set()
            children = [*self._children]
        for child in children:
            child.end()


def script_values(plan: ScriptPlan, cell: Cell, *, lr: float) -> dict[str, Any]:
    """Return what the record of a run of a script says before it begins; see `record_values`."""
    return record_values(plan, cell, lr=lr, curves={EVALUATION: {"value": plan.measure.name}})


def _flags(plan: ScriptPlan, arm: Arm, seed: int) -> list[str]:
    """Return the flags of `regrad run` for an arm."""
    flags: list[str] = []
    if arm.corrections:
        flags += ["--corrections", *arm.corrections]
    for name in arm.control_of:
        flags += ["--control-of", name]
    for name in plan.config.optimizer_class:
        flags += ["--optimizer-class", name]
    if plan.config.seed_by_run:
        flags += ["--seed", str(seed), "--shift-seeds"]
    return flags


def _new_folder(run: Path, name: str) -> Path:
    """Make an empty folder in a run's own; what an earlier attempt wrote goes."""
    folder = run / name
    if folder.is_symlink() or folder.exists():
        remove_folder(folder)
    output = run / OUTPUT
    output.unlink(missing_ok=True)
    return make_folder(run, name)


def _keep(record: RunLog, seen: Measured, *, seconds: float | None = None) -> None:
    numbers = {"epoch": None, "loss": None, "value": seen.value, "lr": None, "seconds": seconds}
    record.log(EVALUATION, seen.step, numbers)


def _read_receipt(file: Path, arm: Arm) -> dict[str, Any]:
    """Return the receipt of a run's first attachment, with what was seen of the others."""
    if not file.is_file():
        return {}
    told = json.loads(file.read_text(encoding="utf-8"))
    if not told["attached"]:
        return {}
    first = told["attached"][0]
    others = told["attached"][1:]
    more = {name: told[name] for name in ("start", "control_of", "not_attached")}
    return {
        **first["receipt"],
        "script": {"optimizer": first["optimizer"], "modules": first["modules"], **more},
        "other_attachments": others,
        "run": {"control": control_as_values(arm.control) if arm.control else None},
    }


def _steps(receipt: Mapping[str, Any]) -> int:
    return int(receipt.get("steps_applied", 0)) + int(receipt.get("steps_skipped", 0))


def _touched(receipt: Mapping[str, Any]) -> bool:
    """Say whether a correction changed any tensor."""
    receipts = [receipt, *(other["receipt"] for other in receipt.get("other_attachments", ()))]
    return any(_touched_in(one) for one in receipts)


def _touched_in(receipt: Mapping[str, Any]) -> bool:
    for stages in receipt.get("effects", {}).values():
        if any(seen["share_touched"] > 0 for seen in stages.values()):
            return True
    return False
