"""PowerGrad Transform: the logit gradient of a flattened softmax, with the plain loss value."""

from regrad_powergrad.correction import PowerGrad
from regrad_powergrad.loss import PowerGradCrossEntropyLoss

__all__ = ["PowerGrad", "PowerGradCrossEntropyLoss"]
