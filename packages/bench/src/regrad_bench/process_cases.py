"""The step of data-parallel processes on one machine, with and without corrections."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from regrad import RegradError, RegradWarning
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from regrad_bench.cases import Case, Pair, Setting
from regrad_bench.step_cases import attach_to, that_go_together
from regrad_bench.training import Trainer, resnet20

PROCESSES = (1, 2, 4)
CORRECTIONS = 4
STOP = "stop"


def process_cases() -> list[Case]:
    """Return one case for each number of processes."""
    cores = os.cpu_count() or 1
    cases = []
    for number in PROCESSES:
        crowded = f", more than the {cores} cores here" if number > cores else ""
        cases.append(
            Case(
                name=f"processes/{number}",
                ours=f"{number} × ResNet-20 step (gloo, {CORRECTIONS} corrections){crowded}",
                peer="without corrections",
                build=_build(number),
                most_pairs=10,
                host_only=True,
                wall=True,
            )
        )
    return cases


def _build(number: int) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        world = World(min(number, 2) if setting.quick else number, setting)
        return Pair(
            ours=lambda: world.step("ours"), peer=lambda: world.step("peer"), close=world.close
        )

    return build


class World:
    """Processes that step together, each with one thread.

    Args:
        number: How many.
        setting: How large.

    Raises:
        RegradError: If the corrections could not be attached in one of them.
    """

    def __init__(self, number: int, setting: Setting) -> None:
        names = that_go_together(setting, CORRECTIONS, layout="ddp")
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = (Path(self._folder.name) / "store").as_uri()
        size: dict[str, Any] = {"init_method": store, "world_size": number}
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, names, setting),
                kwargs={"rank": rank, **size},
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self._wait()

    def step(self, side: str) -> None:
        """Let every process take one step of a side, "ours" or "peer"; wait for all."""
        for end in self._ends:
            end.send(side)
        self._wait()

    def _wait(self) -> None:
        for end in self._ends:
            try:
                problem = end.recv()
            except EOFError:
                problem = "a process ended"
            if problem:
                self.close()
                raise RegradError(problem)

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            with contextlib.suppress(OSError):  # it may have ended already
                end.send(STOP)
        for process in self._processes:
            process.join(timeout=30)
            process.kill()
        self._ends, self._processes = [], []
        self._folder.cleanup()


def _serve(end: Connection, names: list[str], setting: Setting, **group: Any) -> None:
    """Build both sides in one process, then take the steps that are requested."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RegradWarning)
    distributed.init_process_group("gloo", **group)
    try:
        sides = {"ours": _trainer(setting), "peer": _trainer(setting)}
        attached = attach_to(sides["ours"], names)
    except (ValueError, RegradError) as problem:
        end.send(str(problem))
        return
    end.send(None)
    side = end.recv()
    while side != STOP:
        attached.pass_the_meter()
        sides[side].step()
        end.send(None)
        side = end.recv()
    distributed.destroy_process_group()


def _trainer(setting: Setting) -> Trainer:
    """Return a trainer whose model is data-parallel."""
    trainer = Trainer(resnet20(setting), setting.device)
    wrapped: Any = DistributedDataParallel(trainer.model)
    trainer.model = wrapped
    return trainer
