"""Corrections of gradients in the Hugging Face Trainer: one callback."""

from regrad_transformers.callback import RegradCallback

__all__ = ["RegradCallback"]
