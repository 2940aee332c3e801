"""Gradient corrections in PyTorch Lightning: one callback."""

from regrad_lightning.callback import RegradCallback

__all__ = ["RegradCallback"]
