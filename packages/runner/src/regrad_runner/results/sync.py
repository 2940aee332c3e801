"""Show a whole folder in its tracker: what is already there is left unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regrad_runner.addresses import check_address
from regrad_runner.results.about import read_about
from regrad_runner.results.locks import syncing
from regrad_runner.results.view import FolderView, Verdicts
from regrad_runner.settings.loading import read_settings
from regrad_runner.tracking.choosing import MLFLOW, store_of
from regrad_runner.tracking.mlflow import Sent
from regrad_runner.tracking.projector import Projection


@dataclass
class Synced:
    """What `sync` did.

    Attributes:
        shown: Address of the store, as it may be shown.
        sent: What was missing there.
        runs: How many runs lacked something.
        killed: Runs that never ended, which are shown as killed.
        problems: Why something is still missing, in one line each.
        notes: What else to tell the user.
    """

    shown: str
    sent: Sent
    runs: int
    killed: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether everything is there."""
        return not self.problems

    def in_words(self, folder: Path) -> Iterator[str]:
        """Say it, line by line.

        Args:
            folder: That was synced.
        """
        yield from self.notes
        if self.sent:
            sent = f"{self.sent.points} numbers and {self.sent.files} files"
            yield f"{sent} of {self.runs} runs sent to {self.shown}"
        elif self.is_complete:
            yield f"everything in {folder} is at {self.shown}"
        if self.killed:
            yield f"{self.killed} runs that never ended are shown as KILLED"
        for problem in self.problems:
            yield f"not everything in {folder} is at {self.shown}: {problem}; run this again later"


def sync(folder: Path, address: str | None = None, *, verdicts: Verdicts | None = None) -> Synced:
    """Send a store everything in a folder that it lacks.

    Args:
        folder: What `compare` or `train` wrote.
        address: Of an MLflow store; None for the tracker in the folder's settings: with MLflow
            at the address there, or else in the folder's own database.
        verdicts: Returns the numbers of a comparison's verdicts: see `FolderView`.

    Raises:
        ValueError: If there is no such folder, its settings are damaged, a command writes it, or
            the address holds a password.
        DiskError: If it cannot be locked.
    """
    if not (folder / "config.yaml").exists() or not read_about(folder):
        raise ValueError(f"folder must be one that compare or train wrote, got '{folder}'")
    kind = MLFLOW
    if address is None:
        kind = str(read_settings(folder / "config.yaml").get("tracker"))
        address = _address_of(folder)
    else:
        check_address(address)
    with syncing(folder):
        store = store_of(kind, folder, address)
        view = FolderView(folder, under_way=False, verdicts=verdicts)
        done = Projection(store, view.sources).until_complete()
    return Synced(store.shown, done.sent, done.runs, view.killed, done.problems, store.notes)


def _address_of(folder: Path) -> str | None:
    """Return the address in a folder's settings."""
    address = read_settings(folder / "config.yaml").get("tracking_uri")
    return check_address(address) if isinstance(address, str) else None
