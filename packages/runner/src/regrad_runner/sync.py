"""Delivering what a folder's runs could not send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from regrad_runner.delivery import Delivery
from regrad_runner.spool import Spool, spools, take_spool
from regrad_runner.tracking import UNSENT


@dataclass
class Synced:
    """What `sync` did.

    Attributes:
        delivered: Records by the address that they went to.
        killed: Runs that never ended and are now marked KILLED.
        busy: Processes that are under way and deliver by themselves.
        waiting: Records that are still there.
        problem: Why.
        refused: Files with records that the server will never take.
    """

    delivered: dict[str, int]
    killed: int = 0
    busy: int = 0
    waiting: int = 0
    problem: str = ""
    refused: tuple[Path, ...] = ()

    def in_words(self, folder: Path) -> Iterator[str]:
        """Say it, line by line.

        Args:
            folder: That was synced.
        """
        for uri, count in self.delivered.items():
            yield f"{count} records delivered to {uri}"
        if self.killed:
            yield f"{self.killed} runs that never ended are marked KILLED"
        if self.waiting:
            yield f"{self.waiting} records wait in {folder / UNSENT}: {self.problem}; run this again later"
        if self.busy:
            yield f"{self.busy} processes are under way there and deliver by themselves"
        for path in self.refused:
            yield f"records that the server refuses are in {path}"
        if not (self.delivered or self.waiting or self.busy or self.refused):
            yield f"nothing waits in {folder}"


def sync(folder: Path) -> Synced:
    """Deliver what waits in a folder, each spool to where it was to go. Two of these at once share the work.

    Args:
        folder: What `compare` or `train` wrote.

    Raises:
        ValueError: If there is no such folder.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"folder must be one that compare or train wrote, got '{folder}'")
    folder = folder.resolve()
    done = Synced(delivered={})
    deliveries: dict[str | None, Delivery] = {}
    for path in spools(folder / UNSENT):
        spool = take_spool(path)
        if spool is None:
            done.busy += path.is_dir()
            continue
        address = spool.address()
        if address not in deliveries:
            deliveries[address] = Delivery(folder, address)
        _sync_one(spool, deliveries[address], done)
    done.refused = tuple(sorted((folder / UNSENT).glob("*/refused.jsonl")))
    return done


def _sync_one(spool: Spool, delivery: Delivery, done: Synced) -> None:
    killed = spool.take_up()
    before = spool.waiting
    try:
        delivery.send(spool)
    except Exception as problem:  # noqa: BLE001 - SQL, HTTP and cloud clients each raise their own kinds
        done.problem = str(problem).partition("\n")[0] or type(problem).__name__
    finally:
        spool.leave()
    if spool.waiting < before:
        done.delivered[delivery.uri] = done.delivered.get(delivery.uri, 0) + before - spool.waiting
    done.waiting += spool.waiting
    done.killed += 0 if spool.waiting else killed
