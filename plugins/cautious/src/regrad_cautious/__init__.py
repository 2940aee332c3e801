"""Cautious optimizers as a correction for regrad."""

from regrad_cautious.correction import Cautious

__all__ = ["Cautious"]
