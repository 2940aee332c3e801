"""Prove a correction or an optimizer: inherit one test per clause."""

from regrad_testing.corrections import CorrectionSuite
from regrad_testing.files import load_beside
from regrad_testing.optimizer_rules import OptimizerStep
from regrad_testing.optimizers import OptimizerSuite
from regrad_testing.problem import Problem, StagedImages
from regrad_testing.processes import run_on_processes
from regrad_testing.references import ReferenceStep

__all__ = [
    "CorrectionSuite",
    "OptimizerStep",
    "OptimizerSuite",
    "Problem",
    "ReferenceStep",
    "StagedImages",
    "load_beside",
    "run_on_processes",
]
