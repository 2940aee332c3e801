"""Every clause of the conformance kit, with the references beside this file."""

from functools import partial

import torch
from regrad_testing import CorrectionSuite, OptimizerSuite, load_beside
from regrad_xgrad import AdaM3, XGrad

reference = load_beside(__file__, "reference")


class OtherLibrary(torch.optim.Adam):
    """Adam's numbers under another class, of whose decay nothing is known."""


class TestXGrad(CorrectionSuite):
    correction = XGrad
    no_effect = {"horizon": 0.0}
    optimizers = {
        **CorrectionSuite.optimizers,
        "adam3": partial(AdaM3, lr=1e-3, weight_decay=0.1),
        "foreign": partial(OtherLibrary, lr=0.01),
    }

    def reference(self, step):
        if step.index == 0:
            return None
        rows = zip(step.weights, step.lrs, step.states, strict=True)
        return [
            weight - step.options.horizon * rate * self.direction(step, state)
            for weight, rate, state in rows
        ]

    def direction(self, step, state):
        if step.optimizer == "SGD":
            rule = reference.SGD()
            rule.buffer = state["momentum_buffer"]
        else:
            rule = reference.Adam(decoupled=True)
            rule.first, rule.second, rule.steps = (
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
            )
        return rule.direction()


class TestAdaM3(OptimizerSuite):
    optimizer = AdaM3
    options = {"lr": 1e-3, "weight_decay": 0.1}
    variants = ({"weight_decay": 0.0}, {"betas": (0.5, 0.9)}, {"maximize": True})
    tolerance = 1e-12

    def reference(self, step):
        names = {"betas": "betas", "eps": "eps", "weight_decay": "decay", "maximize": "maximize"}
        own = {name: step.options[key] for key, name in names.items()}
        rules = step.memory.setdefault("rules", [reference.AdaM3(**own) for _ in step.weights])
        rows = zip(rules, step.weights, step.gradients, strict=True)
        return [rule.step(weight, gradient, step.options["lr"]) for rule, weight, gradient in rows]
