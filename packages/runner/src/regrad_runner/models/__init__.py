"""Models by name, initialised without touching the global random state."""
