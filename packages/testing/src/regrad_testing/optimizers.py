"""The suite for optimizers."""

from __future__ import annotations

from regrad_testing.layout_clauses import LayoutClauses
from regrad_testing.optimizer_loops import OptimizerLoops
from regrad_testing.optimizer_rules import OptimizerRules


class OptimizerSuite(LayoutClauses, OptimizerLoops, OptimizerRules):
    """One test per clause that an optimizer must satisfy: subclass it and set `optimizer`.

    The requirements follow from the arguments that the optimizer takes (`foreach`,
    `maximize`, `weight_decay`). A clause that does not apply is skipped with the
    reason.

    Attributes:
        optimizer: The class, or a function that makes one from parameters and
            keyword arguments.
        options: Keyword arguments under which it is trained.
        reference: A method that takes an `OptimizerStep` and returns the weights
            after the step, in float64, as a list.
        variants: More keyword arguments with which the reference is compared, a
            dict for each comparison.
        layouts: Where two processes must train as one: "ddp", "fsdp2".
        problem: What is trained, a `Problem`.
        tolerance: Largest difference from the reference, relative to the largest weight.
        processes: 2, or 1 to leave out the clauses that start two processes.

    Example:
        >>> import torch
        >>> class TestSGD(OptimizerSuite):
        ...     optimizer = torch.optim.SGD
        ...     options = {"lr": 0.1}
        ...     def reference(self, step):
        ...         rate = step.options["lr"]
        ...         pairs = zip(step.weights, step.gradients, strict=True)
        ...         return [weight - rate * gradient for weight, gradient in pairs]
        >>> TestSGD().test_the_first_steps_are_those_of_the_reference()
    """
