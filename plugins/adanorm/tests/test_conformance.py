"""Every clause of the conformance kit, with the reference beside this file."""

from functools import partial

import torch
from regrad_adanorm import AdaNorm
from regrad_testing import CorrectionSuite, load_beside

reference = load_beside(__file__, "reference")


def lengthened(step):
    """Return every gradient as the rule of its tensor gives it back."""
    rules = step.memory.setdefault(
        "rules", [reference.Rule(step.options.decay) for _ in step.names]
    )
    return [rule(gradient) for rule, gradient in zip(rules, step.gradients, strict=True)]


class TestMoment(CorrectionSuite):
    correction = AdaNorm
    effective_options = {"decay": 0.5}
    no_effect = {"decay": 0.0}
    optimizers = {
        **CorrectionSuite.optimizers,
        "radam with decay": partial(torch.optim.RAdam, lr=0.01, weight_decay=0.1, maximize=True),
    }

    def reference(self, step):
        return lengthened(step)


class TestGradient(CorrectionSuite):
    correction = AdaNorm
    effective_options = {"decay": 0.5, "target": "gradient"}
    no_effect = {"decay": 0.0}

    def reference(self, step):
        return lengthened(step)
