"""Prove a correction, an optimizer or a layout: inherit one test per clause."""

from regrad_testing.corrections import CorrectionSuite
from regrad_testing.files import load_beside
from regrad_testing.layout_suite import LayoutSuite
from regrad_testing.optimizer_rules import OptimizerStep
from regrad_testing.optimizers import OptimizerSuite
from regrad_testing.problem import Problem, SeveralExits, StagedImages
from regrad_testing.processes import run_on_processes
from regrad_testing.references import ReferenceStep
from regrad_testing.waiting import no_waiting

__all__ = [
    "CorrectionSuite",
    "LayoutSuite",
    "OptimizerStep",
    "OptimizerSuite",
    "Problem",
    "ReferenceStep",
    "SeveralExits",
    "StagedImages",
    "load_beside",
    "no_waiting",
    "run_on_processes",
]
