"""Boosted exits: each exit of a network learns what the exits before it leave."""

from regrad_boosted.correction import Boosted

__all__ = ["Boosted"]
