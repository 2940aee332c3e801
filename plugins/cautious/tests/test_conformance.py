"""Every clause of the conformance kit, with the reference beside this file."""

import torch
from regrad_cautious import Cautious
from regrad_testing import CorrectionSuite, load_beside

reference = load_beside(__file__, "reference")


def masked(step):
    """Return every displacement as the rule gives it back."""
    options = vars(step.options)
    found = []
    for displacement, gradient in zip(step.displacements, step.gradients, strict=True):
        numbers = reference.cautious(
            displacement.flatten().tolist(), gradient.flatten().tolist(), **options
        )
        found.append(torch.tensor(numbers, dtype=torch.float64).reshape(displacement.shape))
    return found


class TestShare(CorrectionSuite):
    correction = Cautious

    def reference(self, step):
        return masked(step)


class TestCount(CorrectionSuite):
    correction = Cautious
    effective_options = {"divisor": "count"}
    processes = 1

    def reference(self, step):
        return masked(step)
