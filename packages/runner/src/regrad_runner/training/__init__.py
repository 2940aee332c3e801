"""One training run: settings resolved, model and optimizer made, the loop, its evaluations."""
