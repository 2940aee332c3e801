"""GC-W, an offset on gradients learned from the training history, as a correction for regrad."""

from regrad_gcw.correction import GCW

__all__ = ["GCW"]
