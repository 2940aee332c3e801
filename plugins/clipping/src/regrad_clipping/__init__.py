"""Clipping as corrections for regrad: by norm, by value, and relative to the weights' norms."""

from regrad_clipping.adaptive import AGC
from regrad_clipping.correction import ClipNorm, ClipValue

__all__ = ["AGC", "ClipNorm", "ClipValue"]
