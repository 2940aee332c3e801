"""What is trained: data, model, loss, measure and settings, found by name.

Your own workload needs these three names, and `regrad_runner.workloads.samples`.
"""

from regrad_runner.workloads.workload import Defaults, Measure, Workload

__all__ = ["Defaults", "Measure", "Workload"]
