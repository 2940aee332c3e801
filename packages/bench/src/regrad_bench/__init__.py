"""Measure what gradient corrections cost, beside peers that implement the same methods."""
