"""Clipping as corrections for regrad: by norm, by value, relative to the weights, of the update."""

from regrad_clipping.adaptive import AGC
from regrad_clipping.correction import ClipNorm, ClipUpdate, ClipValue

__all__ = ["AGC", "ClipNorm", "ClipUpdate", "ClipValue"]
