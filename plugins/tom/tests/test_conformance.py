"""Every clause of the conformance kit, with the reference beside this file."""

import torch
from regrad_testing import OptimizerSuite, load_beside
from regrad_tom import Tom

reference = load_beside(__file__, "reference")


class TestTom(OptimizerSuite):
    optimizer = Tom
    options = {"lr": 0.01, "weight_decay": 0.1, "correct_bias": True}
    variants = (
        {"weight_decay": 0.0, "correct_bias": False},
        {"weight_decay": 0.0},
        {"correct_bias": False},
        {"maximize": True},
        {"betas": (0.5, 0.6, 0.9)},
    )
    tolerance = 1e-12

    def reference(self, step):
        names = {"lr": "rate", "betas": "betas", "eps": "eps", "weight_decay": "decay"}
        own = {name: step.options[key] for key, name in names.items()}
        own |= {key: step.options[key] for key in ("correct_bias", "maximize")}
        rules = step.memory.setdefault("rules", [reference.Tom(**own) for _ in step.weights])
        moved = []
        for rule, weight, gradient in zip(rules, step.weights, step.gradients, strict=True):
            numbers = rule.step(weight.flatten().tolist(), gradient.flatten().tolist())
            moved.append(torch.tensor(numbers, dtype=torch.float64).reshape(weight.shape))
        return moved
