"""Every clause of the conformance kit, with the reference beside this file."""

import torch
from regrad_gcw import GCW
from regrad_testing import CorrectionSuite, StagedImages, load_beside

reference = load_beside(__file__, "reference")
SOON = {"warmup_steps": 1, "fit_every": 2}
NEUTRAL = {"prior": 0.0, "predictor": "prior"}


class TestAllLayers(CorrectionSuite):
    correction = GCW
    effective_options = {**SOON, "layers": "all"}
    no_effect = NEUTRAL

    def reference(self, step):
        # SGD keeps no moment that torch's Adam family has: there the gradient is corrected
        if step.stage != {"SGD": "gradient", "AdamW": "moment"}[step.optimizer]:
            return None
        rules = step.memory.setdefault(
            "rules", [reference.Tensor(g.numel(), 0.9, **SOON) for g in step.gradients]
        )
        rows = zip(rules, step.gradients, strict=True)
        corrected = [
            (rule.correct(gradient.flatten().tolist()), gradient.shape) for rule, gradient in rows
        ]
        return [
            torch.tensor(numbers, dtype=torch.float64).reshape(shape)
            for numbers, shape in corrected
        ]


class TestAttention(CorrectionSuite):
    correction = GCW
    effective_options = {
        **SOON,
        "layers": "all",
        "predictor": "attention",
        "fit_target": "hindsight",
    }
    no_effect = NEUTRAL


class TestStages(CorrectionSuite):
    correction = GCW
    effective_options = SOON
    no_effect = NEUTRAL
    problem = StagedImages()
    processes = 1
