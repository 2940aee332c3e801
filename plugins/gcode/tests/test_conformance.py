"""Every clause of the conformance kit that needs no reference; the rule itself is in test_correction.py."""

from regrad_gcode import GCODE
from regrad_testing import CorrectionSuite, StagedImages

SOON = {"warmup_steps": 1, "weight": 0.5}


class TestGivenBranches(CorrectionSuite):
    """Branches that stay as they were drawn: every clause holds, accumulation too."""

    correction = GCODE
    effective_options = {**SOON, "fit_every": 1000}
    no_effect = {"weight": 0.0}
    problem = StagedImages()


class TestFittedBranches(CorrectionSuite):
    correction = GCODE
    effective_options = {**SOON, "fit_every": 2, "norm": "keep"}
    no_effect = {"weight": 0.0}
    problem = StagedImages()
