"""What plugins read of the first forward, under the path that has been public since 0.1."""

from regrad.module_hooks import WRAPPER
from regrad.record import Call
from regrad.wrappers import innermost_optimizer

__all__ = ["WRAPPER", "Call", "innermost_optimizer"]
