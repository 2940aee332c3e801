"""Linear layers' inputs kept for backward in int8 or as a sample of rows, for regrad."""

from regrad_activations.correction import WTACRS, Int8Rows, UniformRows

__all__ = ["WTACRS", "Int8Rows", "UniformRows"]
