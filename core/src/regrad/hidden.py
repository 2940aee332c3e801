"""Hide broken distributions on import, in processes that import a list of modules first."""

from regrad.distributions import hide_broken

hide_broken()
