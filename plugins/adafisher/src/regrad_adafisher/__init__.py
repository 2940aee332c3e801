"""AdaFisher, a diagonal Kronecker-factored Fisher that divides gradients, as a correction."""

from regrad_adafisher.correction import AdaFisher

__all__ = ["AdaFisher"]
