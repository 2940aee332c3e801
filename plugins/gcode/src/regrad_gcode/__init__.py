"""GC-ODE, neural ODE branches that add to the gradients of hidden states, as a correction for regrad."""

from regrad_gcode.correction import GCODE

__all__ = ["GCODE"]
