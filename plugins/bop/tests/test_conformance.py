"""Every clause of the conformance kit for the real groups, with the reference beside this file.

The kit's weights are real numbers; those of binary groups are in `test_binary.py`.
"""

import torch
from regrad_bop import Bop, Bop2
from regrad_testing import OptimizerSuite, load_beside

reference = load_beside(__file__, "reference")


def with_real_rate(kind):
    """Return a maker of optimizers whose `lr` is that of the real groups."""

    def make(parameters, lr=0.01, **options):
        return kind(parameters, real_lr=lr, **options)

    return make


class TestRealGroupsOfBop(OptimizerSuite):
    optimizer = staticmethod(with_real_rate(Bop))
    options = {"lr": 0.01, "weight_decay": 0.1}
    variants = ({"weight_decay": 0.0}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3})
    tolerance = 1e-12

    def reference(self, step):
        names = {"lr": "rate", "betas": "betas", "eps": "eps", "weight_decay": "decay"}
        own = {name: step.options[key] for key, name in names.items()}
        own["maximize"] = step.options["maximize"]
        rules = step.memory.setdefault("rules", [reference.AdamW(**own) for _ in step.weights])
        moved = []
        for rule, weight, gradient in zip(rules, step.weights, step.gradients, strict=True):
            numbers = rule.step(weight.flatten().tolist(), gradient.flatten().tolist())
            moved.append(torch.tensor(numbers, dtype=torch.float64).reshape(weight.shape))
        return moved


class TestRealGroupsOfBop2(TestRealGroupsOfBop):
    optimizer = staticmethod(with_real_rate(Bop2))
    variants = ()
    processes = 1
