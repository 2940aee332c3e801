"""Every clause of the conformance kit on a network with three exits, with the reference."""

import torch
from regrad_boosted import Boosted
from regrad_testing import CorrectionSuite, SeveralExits, load_beside

reference = load_beside(__file__, "reference")


class TestBoosted(CorrectionSuite):
    correction = Boosted
    effective_options = {"decay": 0.5}
    no_effect = {"decay": 0.0}
    problem = SeveralExits()

    def reference(self, step):
        exits = [logits.tolist() for logits in step.logits]
        slopes = reference.gradients(exits, step.targets.tolist(), decay=step.options.decay)
        return tuple(torch.tensor(rows, dtype=torch.float64) for rows in slopes)


class TestRescaled(CorrectionSuite):
    """With the means of the exits' gradients, which the logits do not show."""

    correction = Boosted
    effective_options = {"decay": 0.5, "rescale": True}
    problem = SeveralExits()
