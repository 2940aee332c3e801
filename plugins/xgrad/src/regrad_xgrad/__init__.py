"""XGrad, weight prediction for any optimizer, as a correction for regrad; the optimizer AdaM3."""

from regrad_xgrad.correction import XGrad
from regrad_xgrad.optimizer import AdaM3

__all__ = ["AdaM3", "XGrad"]
