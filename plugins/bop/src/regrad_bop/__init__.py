"""Bop and Bop2ndOrder, which flip binary weights, as optimizers; `binarise_` makes such weights."""

from regrad_bop.optimizer import Bop, Bop2
from regrad_bop.signs import binarise_

__all__ = ["Bop", "Bop2", "binarise_"]
