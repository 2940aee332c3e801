"""Tracking servers: what is shown there, and where."""
