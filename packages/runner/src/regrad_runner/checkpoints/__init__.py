"""Checkpoints that continue a run exactly."""
