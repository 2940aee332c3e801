"""Tom as in the paper: one number at a time, no cleverness (arXiv 2109.03820).

The level m and the trend r of the gradients are smoothed as in Holt's method; the step goes along their sum.
"""

from __future__ import annotations

import math


class Tom:
    def __init__(
        self,
        rate=1e-3,
        betas=(0.9, 0.99, 0.999),
        eps=1e-8,
        decay=0.0,
        correct_bias=False,
        maximize=False,
    ):
        self.rate, self.betas, self.eps, self.decay, self.correct_bias = (
            rate,
            betas,
            eps,
            decay,
            correct_bias,
        )
        self.sign = -1.0 if maximize else 1.0
        self.level = self.trend = self.square = self.last = None
        self.steps = 0

    def step(self, weights, gradients):
        """Return the new weights, a list of floats."""
        if self.level is None:
            self.level, self.trend, self.square, self.last = (
                [0.0] * len(weights) for _ in range(4)
            )
        self.steps += 1
        one, two, three = self.betas
        result = []
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            g = self.sign * gradient
            self.level[i] = one * (self.level[i] + self.trend[i]) + (1 - one) * g
            self.trend[i] = two * self.trend[i] + (1 - two) * (g - self.last[i])
            self.square[i] = three * self.square[i] + (1 - three) * g * g
            self.last[i] = g
            bias = 1 - (one * two) ** self.steps if self.correct_bias else 1.0
            root = math.sqrt(self.square[i] / (1 - three**self.steps))
            shrunk = weight - self.rate * self.decay * weight
            result.append(
                shrunk - self.rate * ((self.level[i] + self.trend[i]) / bias) / (root + self.eps)
            )
        return result
