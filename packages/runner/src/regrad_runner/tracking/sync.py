"""Delivering what a folder's runs could not send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regrad_runner.addresses import check_address, shown_address, without_secrets
from regrad_runner.files import check_own_folder
from regrad_runner.settings.loading import read_settings
from regrad_runner.tracking.delivery import Delivery
from regrad_runner.tracking.mlflow_ import UNSENT
from regrad_runner.tracking.spool import Spool, spools, take_spool


@dataclass
class Synced:
    """What `sync` did.

    Attributes:
        delivered: Records by the address that they went to.
        killed: Runs that never ended and are now marked KILLED.
        busy: Processes that are under way and deliver by themselves.
        waiting: Records that are still there.
        problem: Why.
        elsewhere: Records that are there for an address which is not the folder's, by that address.
        refused: Files with records that the server will never take.
        notes: What else is to be told.
    """

    delivered: dict[str, int]
    killed: int = 0
    busy: int = 0
    waiting: int = 0
    problem: str = ""
    elsewhere: dict[str, int] = field(default_factory=dict)
    refused: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether everything arrived that is not under way."""
        return not (self.waiting or self.elsewhere or self.refused)

    def in_words(self, folder: Path) -> Iterator[str]:
        """Say it, line by line.

        Args:
            folder: That was synced.
        """
        yield from self.notes
        for uri, count in self.delivered.items():
            yield f"{count} records delivered to {uri}"
        if self.killed:
            yield f"{self.killed} runs that never ended are marked KILLED"
        if self.waiting:
            yield f"{self.waiting} records wait in {folder / UNSENT}: {self.problem}; run this again later"
        for uri, count in self.elsewhere.items():
            what = f"{count} records wait in {folder / UNSENT} for {uri}, which is not the folder's address"
            yield f"{what}; --tracking-uri {uri} delivers them"
        if self.busy:
            yield f"{self.busy} processes are under way there and deliver by themselves"
        for path in self.refused:
            yield f"records that the server refuses are in {path}"
        if self.is_complete and not (self.delivered or self.busy):
            yield f"nothing waits in {folder}"


def sync(folder: Path, address: str | None = None) -> Synced:
    """Deliver what waits in a folder. Two of these at once share the work.

    Records name the address that they were logged for. A folder may come from anywhere, so they go there only if
    it is the folder's own database, the address in its settings, or the one that is given.

    Args:
        folder: What `compare` or `train` wrote.
        address: To deliver to, beside the folder's own.

    Raises:
        ValueError: If there is no such folder, its settings are damaged, or the address holds a password.
        DiskError: If `unsent` is a link or a file.
    """
    if not (folder / "config.yaml").exists():
        raise ValueError(f"folder must be one that compare or train wrote, got '{folder}'")
    allowed = {None, _address_of(folder), address and check_address(address)}
    folder = folder.resolve()
    check_own_folder(folder / UNSENT)
    done = Synced(delivered={})
    deliveries: dict[str | None, Delivery] = {}
    for path in spools(folder / UNSENT):
        spool = take_spool(path)
        if spool is None:
            done.busy += path.is_dir()
            continue
        wanted = spool.address()
        if wanted not in allowed:
            _leave_for_elsewhere(spool, str(wanted), done)
            continue
        if wanted not in deliveries:
            deliveries[wanted] = Delivery(folder, wanted)
        _sync_one(spool, deliveries[wanted], done)
    done.refused = tuple(sorted((folder / UNSENT).glob("*/refused.jsonl")))
    return done


def _address_of(folder: Path) -> str | None:
    """Return the address in a folder's settings."""
    address = read_settings(folder / "config.yaml").get("tracking_uri")
    return check_address(address) if isinstance(address, str) else None


def _leave_for_elsewhere(spool: Spool, address: str, done: Synced) -> None:
    spool.take_up(end_runs=False)
    shown = shown_address(address)
    done.elsewhere[shown] = done.elsewhere.get(shown, 0) + spool.waiting
    spool.release()


def _sync_one(spool: Spool, delivery: Delivery, done: Synced) -> None:
    killed = spool.take_up()
    try:
        delivery.send(spool)
    except Exception as problem:  # noqa: BLE001 - SQL, HTTP and cloud clients each raise their own kinds
        first = str(problem).partition("\n")[0] or type(problem).__name__
        done.problem = without_secrets(first)
    finally:
        spool.leave()
    done.notes += delivery.notes
    delivery.notes.clear()
    if spool.delivered:
        done.delivered[delivery.shown] = done.delivered.get(delivery.shown, 0) + spool.delivered
    done.waiting += spool.waiting
    done.killed += 0 if spool.waiting else killed
