"""Clauses about several processes: one launch of two per suite, read by one test per layout."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from regrad import RegradError
from torch import nn

from regrad_testing.clauses import clause, difference, require, same_bits, skip
from regrad_testing.processes import launch
from regrad_testing.settings import MORE, SuiteBase
from regrad_testing.worker import WORLD, Case

Results = list[dict[str, Any]]
Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    """Wrap a model for data-parallel training."""
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> Any:
    """Shard every parameter along its rows, child by child."""
    # only workers need these
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (WORLD,))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_by_columns(model: nn.Module) -> Any:
    """Shard parameters along dimension 1 where its size allows it: units are split."""
    # only workers need these
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    def placement(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() > 1 and parameter.shape[1] % WORLD == 0:
            return Shard(1)
        return None  # along dimension 0

    mesh = init_device_mesh("cpu", (WORLD,))
    return fully_shard(model, mesh=mesh, shard_placement_fn=placement)


LAYOUTS: dict[str, dict[str, Callable[[nn.Module], nn.Module]]] = {
    "ddp": {"": ddp},
    "fsdp2": {" by rows": fsdp2, " by columns": fsdp2_by_columns},
}


class LayoutClauses(SuiteBase):
    """One process against two; attaching is refused where a layout is not declared."""

    @classmethod
    def on_two_processes(cls) -> Results:
        """Return what `cases` gave on each of two processes, launched once for the class."""
        if cls.processes < WORLD:
            skip("the suite asks for one process")
        if "launched" not in cls._kept:
            cls._kept["launched"] = launch(cls)
        return cls._kept["launched"]  # type: ignore[no-any-return]

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each of two processes runs with its rank, by layout and optimizer."""
        declared = cls.declared_layouts()
        found: dict[str, Callable[[int], Any]] = {}
        for layout, ways in LAYOUTS.items():
            if layout in declared:
                found |= cls._trainings_apart(layout, ways)
            else:
                wrap = next(iter(ways.values()))
                found[f"{layout} refused"] = functools.partial(cls.is_refused, wrap)
        return found

    @classmethod
    def _trainings_apart(cls, layout: str, ways: Mapping[str, Wrap]) -> dict[str, Case]:
        """Return a training on one layout, in each of its ways, on each optimizer."""
        found: dict[str, Case] = {}
        for way, wrap in ways.items():
            for name in cls.trains_on():
                case = functools.partial(cls.train_apart, name, wrap)
                found[f"{layout}{way} on {name}"] = case
        return found

    @classmethod
    def train_apart(
        cls, name: str, parallel: Callable[[nn.Module], nn.Module], rank: int
    ) -> dict[str, Any]:
        """Train on this rank's rows of every batch; compare with one process that sees all rows."""
        size = cls.problem.batch_size // WORLD
        mine = slice(rank * size, (rank + 1) * size)
        training = cls.train(name, parallel=parallel, rows=mine)
        for index in range(cls.problem.steps):
            training.run([index])
            # An evaluation leaves shards gathered, and must not hide what comes next.
            training.evaluate(index)
        far, where = difference(training.weights(), cls.corrected(name).weights())
        # What the optimizer carries besides is measured on each rank's own rows.
        states = [training.correction_state(), training.optimizer.state_dict()["state"]]
        state = digest(states) if parallel is ddp else None  # the ranks hold different shards
        return {"far": far, "where": where, "state": state, "weights": digest(training.weights())}

    @classmethod
    def is_refused(cls, parallel: Callable[[nn.Module], nn.Module], rank: int) -> dict[str, Any]:
        """Say whether attaching is refused, on any rank."""
        try:
            cls.train(next(iter(cls.trains_on())), parallel=parallel)
        except RegradError:
            return {"refused": True}
        return {"refused": False}

    @clause("ddp")
    def test_two_processes_under_ddp_train_as_one(self) -> None:
        """Two processes under DDP end within 1e-12 of one, with one state; or attach refuses."""
        require_layout(self.on_two_processes(), "ddp")

    @clause("fsdp2")
    def test_two_processes_under_fsdp2_train_as_one(self) -> None:
        """Two processes with shards end within 1e-12 of one, cut either way; or attach refuses."""
        require_layout(self.on_two_processes(), "fsdp2")


def digest(state: Any) -> str:
    """Return a hash of nested tensors and values that is the same only for the same bits."""
    file = io.BytesIO()
    torch.save(state, file)
    return hashlib.sha256(file.getvalue()).hexdigest()


def require_layout(results: Results, layout: str) -> None:
    """Fail the clause unless, on both ranks, all cases of a layout gave one process's numbers."""
    __tracebackhide__ = True
    cases = [case for case in results[0] if case.startswith(layout)]
    require(cases, f"nothing was run on layout {layout!r}")
    for case in cases:
        seen: list[Mapping[str, Any]] = [result[case] for result in results]
        errors = [said["error"] for said in seen if "error" in said]
        if errors:
            last_line = errors[0].strip().splitlines()[-1]
            raise AssertionError(f"{case}: {last_line}\n{''.join(errors)}")
        if case.endswith("refused"):
            said = f"{layout!r} is not declared, but attaching is not refused"
            require(all(one["refused"] for one in seen), said)
        else:
            _require_one_process(case, seen)


def _require_one_process(case: str, seen: list[Mapping[str, Any]]) -> None:
    """Fail the clause unless both ranks end near one process, and with the same bits."""
    __tracebackhide__ = True
    for rank, one in enumerate(seen):
        near = f"{case}, rank {rank}: {one['where']!r} ends {one['far']:.1e} from one process"
        require(one["far"] <= MORE, f"{near}, more than {MORE:.0e}")
    first, second = seen
    require(first["weights"] == second["weights"], f"{case}: the ranks end with different weights")
    require(
        same_bits(first["state"], second["state"]),
        f"{case}: the ranks end with different states, and a checkpoint holds rank 0's",
    )
