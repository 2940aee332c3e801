"""Gradient centralization as a correction for regrad."""

from regrad_centralization.correction import Centralization

__all__ = ["Centralization"]
