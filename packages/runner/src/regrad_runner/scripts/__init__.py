"""A training script of the user's own: run with corrections, unmodified."""
