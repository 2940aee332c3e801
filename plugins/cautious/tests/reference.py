"""The rule of cautious optimizers element by element, in float64, and C-AdamW as published."""

import math


def cautious(displacement, gradient, *, divisor="share", keep="agreeing"):
    """Return the masked step of one tensor; both are flat lists."""
    agrees = [-step * slope > 0 for step, slope in zip(displacement, gradient, strict=True)]
    size = len(displacement)
    by = max(sum(agrees) / size, 1e-3) if divisor == "share" else (sum(agrees) + 1) / size
    return [
        step / by if agree or keep == "all" else 0.0 * step
        for step, agree in zip(displacement, agrees, strict=True)
    ]


class CautiousAdamW:
    """C-AdamW of one tensor: the mask compares the first moment with the gradient."""

    def __init__(self, rate, betas=(0.9, 0.999), eps=1e-8, decay=0.0, *, divisor="share"):
        self.rate = rate
        self.betas = betas
        self.eps = eps
        self.decay = decay
        self.divisor = divisor
        self.steps = 0
        self.first = None
        self.second = None

    def step(self, weights, gradient):
        """Return the weights after a step; both are flat lists."""
        one, two = self.betas
        self.steps += 1
        if self.first is None:
            self.first = [0.0] * len(weights)
            self.second = [0.0] * len(weights)
        self.first = [one * m + (1 - one) * g for m, g in zip(self.first, gradient, strict=True)]
        self.second = [
            two * v + (1 - two) * g * g for v, g in zip(self.second, gradient, strict=True)
        ]
        updates = [
            (m / (1 - one**self.steps)) / (math.sqrt(v / (1 - two**self.steps)) + self.eps)
            for m, v in zip(self.first, self.second, strict=True)
        ]
        agrees = [m * g > 0 for m, g in zip(self.first, gradient, strict=True)]
        size = len(weights)
        by = max(sum(agrees) / size, 1e-3) if self.divisor == "share" else (sum(agrees) + 1) / size
        return [
            weight * (1 - self.rate * self.decay) - self.rate * (update / by if agree else 0.0)
            for weight, update, agree in zip(weights, updates, agrees, strict=True)
        ]
