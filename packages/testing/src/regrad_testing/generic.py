"""Suites for a correction or an optimizer of which only the name is known, from the environment."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import regrad
from regrad import RegradError
from torch.optim import Optimizer

from regrad_testing.clauses import clause, skip
from regrad_testing.corrections import CorrectionSuite
from regrad_testing.loops import Training
from regrad_testing.optimizers import OptimizerSuite
from regrad_testing.problem import Problem, SeveralExits, StagedImages

SPEC = os.environ.get("REGRAD_TESTING_SPEC", "")
LONGEST_WARMUP = 40


def fitting_problem(spec: str) -> Problem:
    """Return the first problem on which attaching is not refused, and a short warm-up ends.

    If a correction changes something in the first step on another, that is taken: with one exit
    one of several has nothing to do.
    """
    is_correction = ":" in spec or spec in regrad.available()
    if not is_correction:
        return Problem()
    accepted: list[Problem] = []
    for problem in (Problem(), StagedImages(), SeveralExits()):
        suite: Any = type("Trial", (CorrectionSuite,), {"correction": spec, "problem": problem})
        try:
            trainings = [suite.train(name).run([0]) for name in suite.trains_on()]
        except (AssertionError, RegradError):
            continue
        warmup = max(correction.needs.warmup_steps for correction in suite.make())
        problem.steps = Problem.steps + min(warmup, LONGEST_WARMUP)
        accepted.append(problem)
        if any(_acted(training) for training in trainings):
            return problem
    return accepted[0] if accepted else Problem()


def _acted(training: Training) -> bool:
    """Say whether the effect meter saw a change."""
    metrics = training.attachment.metrics()
    return any(metrics[key] > 0 for key in metrics if key.endswith("/trigger_rate"))


class TestInstalledCorrection(CorrectionSuite):
    """A correction with its default options or those given with its name, without a reference."""

    correction: ClassVar[Any] = SPEC
    problem: ClassVar[Problem] = fitting_problem(SPEC)

    @clause("effect")
    def test_it_changes_the_training_and_the_meter_sees_it(self) -> None:
        """With these options the weights differ, and the effect meter measured a change."""
        try:
            super().test_it_changes_the_training_and_the_meter_sees_it()
        except AssertionError:
            if any(correction.idle_reason() is not None for correction in self.make()):
                raise
            skip(
                "it changed nothing here and says that this is normal; "
                "give options under which it acts"
            )


class TestInstalledOptimizer(OptimizerSuite):
    """An optimizer with its default options but the learning rate; there is no reference."""

    @staticmethod
    def optimizer(parameters: Any, **options: Any) -> Optimizer:
        """Return the optimizer that the entry point names."""
        make: Any = regrad.load(SPEC, "regrad.optimizers")
        made: Optimizer = make(parameters, **options)
        return made
