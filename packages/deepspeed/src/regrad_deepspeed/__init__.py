"""DeepSpeed's ZeRO as a layout for regrad: stages 1, 2 and 3."""

from regrad_deepspeed.layout import ZeroLayout

__all__ = ["ZeroLayout"]
