"""What the author of a suite supplies, and what the clauses derive from it."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import regrad
import torch
from regrad import Correction, RegradError
from torch import Tensor
from torch.optim import Optimizer

from regrad_testing.clauses import require, require_same
from regrad_testing.loops import MakeOptimizer, Training
from regrad_testing.problem import Problem
from regrad_testing.references import ReferenceStep
from regrad_testing.worker import WORLD

ALL_LAYOUTS = ("plain", "ddp", "fsdp2")
MORE = 1e-12
"""Largest difference in float64 where sums are taken in another order."""


def optimizers() -> dict[str, MakeOptimizer]:
    """Return the optimizers on which a suite trains by default."""
    return {
        "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    }


class SuiteBase(ABC):
    """What suites for corrections and for optimizers share."""

    problem: ClassVar[Problem] = Problem()
    tolerance: ClassVar[float] = 1e-10
    processes: ClassVar[int] = WORLD
    _kept: ClassVar[dict[Any, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._kept = {}

    @classmethod
    @abstractmethod
    def trains_on(cls) -> dict[str, MakeOptimizer]:
        """Return the optimizers, by name, that the clauses train on."""

    @classmethod
    @abstractmethod
    def train(cls, name: str, options: Mapping[str, Any] | None = None, **how: Any) -> Training:
        """Return a training on the optimizer `name`, before its first step."""

    @classmethod
    @abstractmethod
    def declared_layouts(cls) -> set[str]:
        """Return the layouts on which it is declared to be exact."""

    @classmethod
    def corrected(cls, name: str) -> Training:
        """Return a finished training."""
        if ("corrected", name) not in cls._kept:
            cls._kept["corrected", name] = cls.train(name).run()
        return cls._kept["corrected", name]  # type: ignore[no-any-return]

    def require_as_corrected(
        self, name: str, other: Training, what: str, tolerance: float = 0.0
    ) -> None:
        """Fail the clause unless `other` trained, step by step, like the plain loop."""
        __tracebackhide__ = True
        wanted = self.corrected(name).weights_after
        for index, (got, want) in enumerate(zip(other.weights_after, wanted, strict=True)):
            require_same(got, want, f"on {name}, {what}, after step {index}", tolerance=tolerance)


class Settings(SuiteBase):
    """The attributes of a suite for corrections, and the trainings that several clauses read."""

    correction: ClassVar[Any]
    effective_options: ClassVar[Mapping[str, Any]] = {}
    no_effect: ClassVar[Mapping[str, Any] | None] = None
    optimizers: ClassVar[Mapping[str, MakeOptimizer]] = optimizers()
    reference: ClassVar[Callable[[Any, ReferenceStep], Any] | None] = None

    @classmethod
    def make(cls, **options: Any) -> tuple[Correction, ...]:
        """Return new corrections with the effective options, `options` over them."""
        given = inspect.getattr_static(cls, "correction", None)
        given = given.__func__ if isinstance(given, staticmethod) else given
        require(
            given is not None,
            f"{cls.__name__} must set correction: a class, a function or a name with options",
        )
        merged = {**cls.effective_options, **options}
        made = regrad.create(given, **merged) if isinstance(given, str) else given(**merged)
        return made if isinstance(made, tuple) else (made,)

    @classmethod
    def everyone(cls, has: Callable[[Correction], object]) -> bool:
        """Say whether every correction of the suite has a property."""
        return all(has(correction) for correction in cls.make())

    @classmethod
    def trains_on(cls) -> dict[str, MakeOptimizer]:
        """Return the optimizers that the correction accepts; a suite without any fails.

        Raises:
            AssertionError: If attaching is refused on all of them.
        """
        if "trains_on" not in cls._kept:
            reasons = {name: cls._refusal(make) for name, make in cls.optimizers.items()}
            accepted = {n: make for n, make in cls.optimizers.items() if reasons[n] is None}
            told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            require(accepted, f"attaching is refused on every optimizer of the suite: {told}")
            cls._kept["trains_on"] = accepted
        return dict(cls._kept["trains_on"])

    @classmethod
    def _refusal(cls, make: MakeOptimizer) -> str | None:
        """Return why attaching is refused on an optimizer, or None."""
        model = cls.problem.make_model()
        optimizer = make(list(model.parameters()))
        criterion = type(cls.problem).criterion
        try:
            regrad.attach(model, optimizer, cls.make(), criterion).detach()
        except RegradError as refusal:
            return str(refusal)
        return None

    @classmethod
    def train(cls, name: str, options: Mapping[str, Any] | None = None, **how: Any) -> Training:
        """Return a training on the optimizer `name` with the correction, before its first step."""
        return Training(cls.problem, cls.optimizers[name], cls.make(**(options or {})), **how)

    @classmethod
    def plain(cls, name: str) -> Training:
        """Return a finished training without the correction, and without regrad."""
        if ("plain", name) not in cls._kept:
            cls._kept["plain", name] = Training(cls.problem, cls.optimizers[name], None).run()
        return cls._kept["plain", name]  # type: ignore[no-any-return]

    @classmethod
    def declared_layouts(cls) -> set[str]:
        """Return the layouts that all of the suite's corrections declare."""
        return {*ALL_LAYOUTS}.intersection(*(correction.needs.layouts for correction in cls.make()))


def without_regrad(make: MakeOptimizer) -> Optimizer:
    """Return an optimizer of one parameter, to read its class and options."""
    return make([torch.nn.Parameter(torch.zeros(1))])


def as_bits(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors by name."""
    return {name: weight.detach().clone() for name, weight in weights.items()}
