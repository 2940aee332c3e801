"""Suites for layouts: of the engine beside this file, and what is wrong with two others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as if the distribution were installed

from regrad_own_engine import Late, LateLayout
from regrad_testing import LayoutSuite
from regrad_testing.layout_clauses import fsdp2


class TestLate(LayoutSuite):
    layout = "late"
    wrap = staticmethod(Late)


class TestSharded(LayoutSuite):
    layout = "fsdp2"
    wrap = staticmethod(fsdp2)


class WithoutCommit(LayoutSuite):
    """The engine, if it forgot to write back."""

    layout = "late"

    @staticmethod
    def wrap(model):
        """Return a model of an engine whose layout forgets something."""
        LateLayout.commit = give_back_alone
        return Late(model)


def give_back_alone(layout, step):
    """Put the tensors back that the optimizer reads, with what they held."""
    for parameter, waiting in layout._waiting.items():
        parameter.grad = waiting
    layout._waiting.clear()
