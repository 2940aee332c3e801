"""Every clause of the conformance kit that a composition has."""

from regrad_testing import CorrectionSuite, StagedImages


class TestGCGD(CorrectionSuite):
    correction = "gcgd"
    effective_options = {
        "gcw.warmup_steps": 1,
        "gcw.fit_every": 2,
        "gcode.warmup_steps": 1,
        "gcode.weight": 0.5,
        "gcode.fit_every": 2,
    }
    no_effect = {"gcw.prior": 0.0, "gcw.predictor": "prior", "gcode.weight": 0.0}
    problem = StagedImages()
