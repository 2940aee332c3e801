"""Every clause of the conformance kit, with the reference beside this file."""

import torch
from regrad_powergrad import PowerGrad
from regrad_testing import CorrectionSuite, load_beside

reference = load_beside(__file__, "reference")


class TestPowerGrad(CorrectionSuite):
    correction = PowerGrad
    effective_options = {"alpha": 0.3}
    no_effect = {"alpha": 1.0}

    def reference(self, step):
        rows = reference.gradient(
            step.logits.tolist(), step.targets.tolist(), alpha=step.options.alpha
        )
        return torch.tensor(rows, dtype=torch.float64)
