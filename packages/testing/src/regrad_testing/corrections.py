"""The suite for corrections."""

from __future__ import annotations

from regrad_testing.layout_clauses import LayoutClauses
from regrad_testing.loop_clauses import LoopClauses
from regrad_testing.rule_clauses import RuleClauses
from regrad_testing.state_clauses import StateClauses


class CorrectionSuite(LayoutClauses, StateClauses, LoopClauses, RuleClauses):
    """One test per clause that a correction must satisfy: subclass it and set `correction`.

    What a correction must support follows from its `needs`, never from its name. A
    clause that does not apply is skipped with the reason.

    Attributes:
        correction: The class, a function that takes options and returns a new one
            (or a tuple of them), or a name with options as for `regrad.create`.
        effective_options: Options under which it must change something within the
            few steps of the problem: no long warm-up, bounds that are reached.
        no_effect: Options (over the effective ones) under which training is bit for
            bit the uncorrected one; None if there are none.
        reference: A method that takes a `ReferenceStep` and returns what the rule
            makes of it in `step.stage`, in float64 and without regrad, or None for no
            change: for "weights" the points at which gradients are taken, for
            "gradient" the corrected gradients, for "moment" what the first moment
            sees in their place, for "update" the displacements (lists, in the order of
            `step.names`), for "criterion" the gradient of the mean loss with respect to
            `step.logits`, a tuple where that is one.
        optimizers: Functions by name that make optimizers from parameters and
            torch's own keyword arguments. Those that the correction refuses are left
            out. SGD with momentum and AdamW by default.
        problem: What is trained, a `Problem`; `StagedImages()` for corrections that
            need convolutional stages, `SeveralExits()` for those of several outputs.
        tolerance: Largest absolute difference of a weight from the reference.
        processes: 2, or 1 to leave out the clauses that start two processes.

    Example:
        >>> from regrad.correction import Correction, Needs
        >>> class Halve(Correction):
        ...     name = "halve"
        ...     needs = Needs(stages=("gradient",))
        ...     def correct_gradients(self, step):
        ...         for gradient in step.gradients:
        ...             if gradient is not None:
        ...                 gradient.mul_(0.5)
        >>> class TestHalve(CorrectionSuite):
        ...     correction = Halve
        ...     def reference(self, step):
        ...         return [gradient * 0.5 for gradient in step.gradients]
        >>> TestHalve().test_training_is_that_of_the_reference()
    """
