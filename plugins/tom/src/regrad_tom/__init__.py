"""Tom, momentum with the trend of the gradients, as an optimizer."""

from regrad_tom.optimizer import Tom

__all__ = ["Tom"]
