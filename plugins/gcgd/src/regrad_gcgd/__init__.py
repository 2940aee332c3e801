"""GCGD, GC-W and GC-ODE under one name, as a composition for regrad."""

from regrad_gcgd.correction import GCGD

__all__ = ["GCGD"]
