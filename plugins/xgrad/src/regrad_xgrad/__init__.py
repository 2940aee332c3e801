"""XGrad, weight prediction for any optimizer, as a correction for regrad."""

from regrad_xgrad.correction import XGrad

__all__ = ["XGrad"]
