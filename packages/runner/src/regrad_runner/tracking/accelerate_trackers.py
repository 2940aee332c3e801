"""Runs in TensorBoard or Weights & Biases, through Accelerate's trackers: a view of their folders.

Neither can be asked what it holds. So a small file beside says how much of which attempt at a run
was sent, and the next projection, of this process or of another one, continues from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from regrad_runner.addresses import without_secrets
from regrad_runner.files import make_folder, read_regular_file, remove_folder, write_whole
from regrad_runner.settings.yaml_text import write_yaml
from regrad_runner.tracking.mlflow import MetricPoint, Sent, TrackedRun

TENSORBOARD = "tensorboard"
WANDB = "wandb"
THROUGH_ACCELERATE = (TENSORBOARD, WANDB)
SENT_FILE = "regrad.json"
LARGEST_SENT_FILE = 2**16
COMPARISON = "comparison"
SENT_FOLDER = "sent"
# Weights & Biases refuses these in the name of a project, and longer ones.
NOT_IN_PROJECTS = re.compile(r"[/\\#?%:]")
LONGEST_PROJECT = 128
MODES_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")
ACCOUNT_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
WANDB_SERVER = "https://api.wandb.ai"


class SentSoFar(BaseModel):
    """How much of a run was sent.

    Attributes:
        id: Of the attempt at the run.
        points: How many of its points.
        last: Name and step of the last of them; nothing if there is none.
        status: How the run was shown at last.
    """

    model_config = ConfigDict(strict=True)

    id: str = ""
    points: int = 0
    last: list[str | int] = []
    status: str = ""


class AccelerateStore:
    """A way to TensorBoard's event files or to Weights & Biases. Making one connects to nothing.

    Args:
        kind: "tensorboard" or "wandb".
        folder: The output folder, in which event files and offline runs are.

    Attributes:
        shown: Where runs are shown, for the user.
        notes: What to tell the user.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind = kind
        self._folder = folder
        self.shown = str(folder / kind)
        self.notes: list[str] = []
        self._trackers: dict[str, Any] = {}

    def project(self, run: TrackedRun) -> Sent:
        """Send what is missing of a run, and return what that was.

        Args:
            run: What to show.

        Raises:
            Exception: What the library or the disk raises; the next projection tries again.
        """
        place = self._place(run)
        known = _sent_so_far(place)
        is_new = known.id != run.id
        if is_new:
            known = SentSoFar(id=run.id)
        start = _start(known, run.points)
        points = run.points[start:]
        if not (is_new or points or known.status != run.status):
            return Sent()
        if is_new and self._kind == TENSORBOARD and place.is_dir():
            remove_folder(place)  # of an attempt that this one replaced
        tracker = self._tracker(run, place)
        if is_new and self._kind == TENSORBOARD:
            tracker.log({"settings": _settings_text(run)}, step=0)
        for values, step, seconds in _steps_of(points):
            self._log(tracker, values, step, seconds)
        if run.status != "RUNNING":
            self._finish(run)
        last = run.points[-1] if run.points else None
        _keep_sent(
            place,
            SentSoFar(
                id=run.id,
                points=len(run.points),
                last=[last.name, last.step] if last else [],
                status=run.status,
            ),
        )
        return Sent(points=len(points), others=int(known.status != run.status))

    def forget(self) -> None:
        """Open what is needed again before it is used the next time: something failed."""
        self._trackers.clear()

    def _place(self, run: TrackedRun) -> Path:
        """Return the folder of a run's event files, and of the file that says what was sent."""
        parts = run.folder.relative_to(self._folder).parts[1:] or (COMPARISON,)
        if self._kind == WANDB:
            parts = (SENT_FOLDER, *parts)
        return self._folder.joinpath(self._kind, *parts)

    def _tracker(self, run: TrackedRun, place: Path) -> Any:
        """Return Accelerate's tracker of a run, which is open."""
        tracker = self._trackers.get(run.id)
        if tracker is None:
            make_folder(self._folder, *place.relative_to(self._folder).parts)
            tracker = self._new_tracker(run, place)
            # This thread is of the process that reports, which need not be Accelerate's first.
            tracker.main_process_only = False
            tracker.start()
            self._trackers[run.id] = tracker
        return tracker

    def _new_tracker(self, run: TrackedRun, place: Path) -> Any:
        from accelerate import PartialState  # noqa: PLC0415 - it takes seconds
        from accelerate.tracking import TensorBoardTracker, WandBTracker  # noqa: PLC0415

        PartialState(cpu=True)  # the trackers log through it; one that is there stays as it is
        if self._kind == TENSORBOARD:
            return TensorBoardTracker(place.name, logging_dir=place.parent)
        wandb = importlib.import_module(WANDB)
        return WandBTracker(
            NOT_IN_PROJECTS.sub("_", run.experiment)[:LONGEST_PROJECT],
            id=run.id,
            name=run.name,
            group=self._folder.resolve().name,
            config={name: _plain(value) for name, value in run.parameters.items()},
            dir=str(self._folder),
            resume="allow",
            reinit="create_new",  # runs of a comparison take place at the same time
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _log(self, tracker: Any, values: dict[str, float], step: int, seconds: float) -> None:
        if self._kind == TENSORBOARD:
            tracker.log(values, step=step, walltime=seconds)
        else:
            tracker.log(values, step=step)

    def _finish(self, run: TrackedRun) -> None:
        """Say that a run has ended."""
        tracker = self._trackers.pop(run.id)
        if self._kind == WANDB and run.status != "FINISHED":
            tracker.tracker.finish(exit_code=1)
        else:
            tracker.finish()


def check_library(kind: str) -> None:
    """Check that a tracker can be used here, before anything is written.

    Args:
        kind: "tensorboard" or "wandb".

    Raises:
        ValueError: If its library is missing, or nobody is logged in at Weights & Biases.
    """
    if importlib.util.find_spec(kind) is None:
        raise ValueError(
            f"--tracker {kind} must find the library {kind}, got none; "
            f"pip install regrad-runner[{kind}]"
        )
    if kind == WANDB and not _has_account():
        raise ValueError(
            "--tracker wandb must find an account, got none; run wandb login or set "
            "WANDB_API_KEY, or set WANDB_MODE=offline and send the runs later with wandb sync"
        )


def _has_account() -> bool:
    """Say whether wandb would not ask for an account in the middle of the first run."""
    if os.environ.get("WANDB_MODE") in MODES_WITHOUT_ACCOUNT:
        return True
    if any(os.environ.get(name) for name in ACCOUNT_VARIABLES):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER)).hostname
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return host in netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _start(known: SentSoFar, points: Sequence[MetricPoint]) -> int:
    """Return how many points were sent: none if the earlier ones are others than now."""
    if known.points == 0 or known.points > len(points):
        return 0
    last = points[known.points - 1]
    return known.points if known.last == [last.name, last.step] else 0


def _steps_of(
    points: Sequence[MetricPoint],
) -> Iterator[tuple[dict[str, float], int, float]]:
    """Yield numbers by name that belong together, with their step and time in seconds."""
    for (step, time), group in groupby(points, lambda point: (point.step, point.time)):
        yield {point.name: point.value for point in group}, step, time / 1000


def _settings_text(run: TrackedRun) -> str:
    """Return the settings of a run as TensorBoard shows them: as a block of code."""
    text = write_yaml({name: _plain(value) for name, value in run.parameters.items()})
    return "".join(f"    {line}\n" for line in text.splitlines())


def _plain(value: Any) -> Any:
    """Return a setting as YAML and Weights & Biases take it."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def _sent_so_far(place: Path) -> SentSoFar:
    """Return how much of a run was sent; nothing if that is not known."""
    try:
        text = read_regular_file(place / SENT_FILE, largest=LARGEST_SENT_FILE)
        return SentSoFar.model_validate_json(text)
    except (OSError, ValidationError):
        return SentSoFar()


def _keep_sent(place: Path, sent: SentSoFar) -> None:
    write_whole(place / SENT_FILE, sent.model_dump_json() + "\n")
