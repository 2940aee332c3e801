"""Hide broken distributions on import: for processes that take a list of modules to import first."""

from regrad.distributions import hide_broken

hide_broken()
