"""AdaNorm, gradients kept at their usual norm, as a correction for regrad."""

from regrad_adanorm.correction import AdaNorm

__all__ = ["AdaNorm"]
