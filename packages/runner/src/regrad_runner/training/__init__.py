"""One training run: settings resolved, model and optimizer built, the loop, its evaluations."""
