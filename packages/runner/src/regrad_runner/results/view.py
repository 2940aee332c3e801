"""How a folder looks in a tracker: a run for each of its runs, and a parent for a comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from regrad_runner.results.about import About, read_about
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import cells_in, trial_in
from regrad_runner.results.points import METRICS
from regrad_runner.results.rates import choices_of, missing_cells
from regrad_runner.results.run import (
    KEPT_FILES,
    POINTS,
    RECORD,
    Line,
    RunRecord,
    Status,
    read_points,
    read_record,
    run_paths,
    status_of,
)
from regrad_runner.settings.continuing import WITHOUT_EFFECT_ON_RESULTS
from regrad_runner.settings.loading import read_settings
from regrad_runner.signals import LeftAtOnce
from regrad_runner.tracking.choosing import store_of
from regrad_runner.tracking.mlflow import ERROR_TAG, HOST_TAG, MetricPoint, ShownStatus, TrackedRun
from regrad_runner.tracking.projector import Projector, Source

# What a comparison shows at its end, beside the pictures in its folder of figures.
EXPORTS = (
    "results.csv",
    "effects.csv",
    "exits.csv",
    "gradient_quality.csv",
    "step_times.json",
    "curves.png",
    "steps.png",
    "comparison.png",
    "report.html",
    "figures.csv",
)
HAS_OUTCOME = ("finished", "diverged", "failed")
FIGURES = "figures"
FIGURE_NAME = re.compile(r"[a-z0-9-]+\.svg")
# Settings that may change when a comparison goes on: MLflow refuses a parameter that changed.
MAY_CHANGE = WITHOUT_EFFECT_ON_RESULTS | {"seeds", "corrections"}
SHOWN: dict[Status, ShownStatus] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "killed": "KILLED",
}


Verdicts = Callable[[Path], Mapping[str, float]]


class FolderView:
    """What a tracker should show of an output folder.

    Args:
        folder: The output folder.
        under_way: Whether this process runs what is in it; runs that have not ended then run.
        only: Folder of the one run to show, beside the comparison; None for all.
        verdicts: Returns the numbers of a comparison's verdicts by name, which its own run shows at
            the end; None to show none.

    Attributes:
        under_way: As above; set it to False at the end.
        killed: How many runs the last look found that never ended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        under_way: bool,
        only: Path | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.under_way = under_way
        self._verdicts = verdicts
        self.killed = 0
        self._folder = folder
        self._only = only
        self._records: dict[Path, tuple[Hashable, RunRecord]] = {}

    def sources(self) -> Iterator[Source]:
        """Yield what there is to show, the comparison before its runs."""
        about = About.model_validate(read_about(self._folder))
        statuses = {path: self._status(path) for path in run_paths(self._folder)}
        self.killed = sum(status == "killed" for status in statuses.values())
        if about.kind == "comparison":
            yield self._comparison_source(about, statuses)
        for path, status in statuses.items():
            if self._only is None or path == self._only:
                state = (status, _stamps(path, (RECORD, POINTS, *KEPT_FILES)))
                yield Source(path, state, partial(self._run, path, about, status))

    def _status(self, path: Path) -> Status:
        """Return how a run ended; one whose record is damaged counts as killed until it is read."""
        try:
            record = self._record(path)
            if record.status == "running" and self.under_way:
                return "running"
            return status_of(path, record)
        except ValueError:
            return "killed"

    def _record(self, path: Path) -> RunRecord:
        """Return the record of a run, which is read again only if it has changed."""
        stamps = _stamps(path, (RECORD,))
        known = self._records.get(path)
        if known is None or known[0] != stamps:
            known = stamps, read_record(path)
            self._records[path] = known
        return known[1]

    def _run(self, path: Path, about: About, status: Status) -> TrackedRun:
        record = read_record(path)
        lines = read_points(path, record)
        is_part = about.kind == "comparison"
        return TrackedRun(
            id=record.id,
            experiment=f"regrad {about.workload}",
            name=record.name,
            status=SHOWN[status],
            started=record.started,
            ended=_end_of(record, lines, status),
            parent=about.id if is_part else "",
            parameters=_parameters(record) if is_part else record.settings,
            tags=_tags(record),
            points=_points(record, lines),
            folder=path,
            files=KEPT_FILES,
            earlier=record.earlier,
        )

    def _comparison_source(self, about: About, statuses: Mapping[Path, Status]) -> Source:
        status = self._comparison_status(about, statuses)
        files = () if self.under_way else self._exports()
        looked_at = ("about.json", "config.yaml", *files)
        state = (status, _stamps(self._folder, looked_at), len(statuses))
        read = partial(self._comparison, about, status, files, list(statuses))
        return Source(self._folder, state, read)

    def _comparison_status(self, about: About, statuses: Mapping[Path, Status]) -> ShownStatus:
        """Say how a comparison ended.

        A command that ends before its last run was killed; the cells of a job array may be queued.
        """
        found = set(statuses.values())
        if self.under_way or "running" in found:
            return "RUNNING"
        if "killed" in found or self._lacks_a_run(about, statuses):
            return "RUNNING" if about.job_array else "KILLED"
        return "FAILED" if "failed" in found else "FINISHED"

    def _lacks_a_run(self, about: About, statuses: Mapping[Path, Status]) -> bool:
        """Say whether a run has not ended that the comparison needs."""
        cells, search = cells_in(self._folder, about.arms, about.measure)
        ended = {path for path, status in statuses.items() if status in HAS_OUTCOME}

        def has_ended(cell: Cell) -> bool:
            return self._folder.joinpath(*cell.folder_names) in ended

        try:
            records = [self._record(path) for path in ended]
            trials = [trial_in(record) for record in records if record.trial]
        except (TypeError, ValueError):  # a damaged run is reported when its turn comes
            return True
        return bool(missing_cells(cells, choices_of(cells, search, trials), has_ended))

    def _comparison(
        self, about: About, status: ShownStatus, files: Sequence[str], runs: Sequence[Path]
    ) -> TrackedRun:
        settings = _settings_of(self._folder)
        ends = [about.started]
        for path in runs:
            with suppress(ValueError):  # a damaged run is reported when its turn comes
                record = self._record(path)
                ends.append(record.ended or record.started)
        return TrackedRun(
            id=about.id,
            experiment=f"regrad {about.workload}",
            name=self._folder.resolve().name,
            status=status,
            started=about.started,
            ended=None if status == "RUNNING" else max(ends),
            parameters={key: value for key, value in settings.items() if key not in MAY_CHANGE},
            tags={key: str(value) for key, value in settings.items() if key in MAY_CHANGE},
            points=self._verdict_points(time=max(ends), step=len(runs)),
            folder=self._folder,
            files=files,
        )

    def _verdict_points(self, *, time: int, step: int) -> list[MetricPoint]:
        """Return the numbers of the verdicts, each as one point.

        Args:
            time: When the last run ended.
            step: Number of runs: of a comparison that went on MLflow shows the last numbers.
        """
        if self._verdicts is None or self.under_way:
            return []
        try:
            numbers = self._verdicts(self._folder)
        except ValueError:  # a damaged run is reported when its turn comes
            return []
        return [MetricPoint(name, number, time, step) for name, number in numbers.items()]

    def _exports(self) -> tuple[str, ...]:
        """Return the names of the files to show at the end; they need not be there."""
        figures = self._folder / FIGURES
        if figures.is_symlink():
            return EXPORTS
        names = sorted(path.name for path in figures.glob("*.svg"))
        shown = [f"{FIGURES}/{name}" for name in names if FIGURE_NAME.fullmatch(name)]
        return (*EXPORTS, *shown)


@contextmanager
def tracking(
    kind: str,
    folder: Path,
    address: str | None,
    *,
    say: Callable[[str], None],
    only: Path | None = None,
    verdicts: Verdicts | None = None,
) -> Iterator[None]:
    """Show in a tracker what the block writes into a folder.

    A thread does so meanwhile, and at the end all of it is shown.

    Args:
        kind: "mlflow", "tensorboard", "wandb", or "none" to show nothing and import nothing.
        folder: The output folder; there.
        address: Of an MLflow server or database; None for the database in the folder.
        say: Called with what goes wrong, also from the thread; no failure stops the block.
        only: Folder of the one run to show.
        verdicts: Returns the numbers of a comparison's verdicts: see `FolderView`.
    """
    if kind == "none":
        yield
        return
    store = store_of(kind, folder, address)
    view = FolderView(folder, under_way=True, only=only, verdicts=verdicts)
    projector = Projector(store, view.sources, say=say)
    seconds: float | None = None
    try:
        yield
    except LeftAtOnce:
        seconds = 0.0
        raise
    finally:
        view.under_way = False
        if not projector.close(seconds):
            why = projector.problem or "it was abandoned at once"
            say(
                f"tracking at {store.shown} is incomplete: {why}; regrad sync {folder} completes it"
            )


def _settings_of(folder: Path) -> dict[str, Any]:
    return read_settings(folder / "config.yaml")


def _parameters(record: RunRecord) -> dict[str, Any]:
    """Return what tells a run of a comparison apart: its parameters in MLflow."""
    values: dict[str, Any] = {
        "arm": record.arm,
        "corrections": " ".join(record.corrections),
        "trial": record.trial,
        "seed": record.seed,
        "lr": record.lr,
    }
    if record.control:
        values["control"] = record.control
    return values


def _tags(record: RunRecord) -> dict[str, str]:
    tags = {HOST_TAG: record.host, ERROR_TAG: record.error}
    return {name: text for name, text in tags.items() if text}


def _points(record: RunRecord, lines: Sequence[Line]) -> list[MetricPoint]:
    """Return the curves of a run, under the names that its record gives them."""
    points = []
    for line in lines:
        numbers = line.numbers()
        names = record.curves.get(line.kind, {})
        if line.kind == METRICS:  # these have their own names
            names = {name: name for name in numbers}
        for key, name in names.items():
            value = numbers.get(key)
            if value is not None:
                points.append(MetricPoint(name, value, line.time, line.step))
    return points


def _end_of(record: RunRecord, lines: Sequence[Line], status: Status) -> int | None:
    """Return when a run ended: if its record does not say, at its last line."""
    if status == "running":
        return None
    if record.ended is not None:
        return record.ended
    return max((line.time for line in lines), default=record.started)


def _stamps(folder: Path, names: Sequence[str]) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what changes whenever a file of these does."""
    return tuple(_stamp(folder / name) for name in names)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
