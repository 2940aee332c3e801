"""GC-ODE, neural ODE branches that add to hidden states' gradients, as a correction for regrad."""

from regrad_gcode.correction import GCODE

__all__ = ["GCODE"]
