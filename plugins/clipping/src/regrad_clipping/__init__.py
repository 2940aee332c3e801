"""Clipping as corrections for regrad: by norm, by value, and by the norms of the weights."""

from regrad_clipping.adaptive import AGC
from regrad_clipping.correction import ClipNorm, ClipValue

__all__ = ["AGC", "ClipNorm", "ClipValue"]
