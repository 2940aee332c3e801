"""Bop, Bop2ndOrder, latent SGD and AdamW as in their papers: one number at a time, no cleverness."""

from __future__ import annotations

import math


class Bop:
    """arXiv 1906.02107, algorithm 1; w is kept where w·m = τ."""

    def __init__(self, rate=1e-4, threshold=1e-8, maximize=False):
        self.rate = rate
        self.threshold = threshold
        self.sign = -1.0 if maximize else 1.0
        self.moment = None

    def step(self, weights, gradients):
        """Return the new weights, a list of floats."""
        if self.moment is None:
            self.moment = [0.0] * len(weights)
        result = []
        for i, (weight, slope) in enumerate(zip(weights, gradients, strict=True)):
            gradient = self.sign * slope
            self.moment[i] = (1 - self.rate) * self.moment[i] + self.rate * gradient
            result.append(-weight if weight * self.moment[i] > self.threshold else weight)
        return result


class Bop2:
    """arXiv 2104.05124; `unbiased` divides by the weights that all gradients have so far."""

    def __init__(
        self,
        rate=1e-7,
        threshold=1e-6,
        second_rate=1e-3,
        unbiased=False,
        warmup_steps=0,
        maximize=False,
    ):
        self.rate = rate
        self.threshold = threshold
        self.second_rate = second_rate
        self.unbiased = unbiased
        self.warmup_steps = warmup_steps
        self.sign = -1.0 if maximize else 1.0
        self.moment = None
        self.square = None
        self.steps = 0

    def step(self, weights, gradients):
        """Return the new weights, a list of floats."""
        if self.moment is None:
            self.moment = [0.0] * len(weights)
            self.square = [0.0] * len(weights)
        self.steps += 1
        result = []
        for i, (weight, slope) in enumerate(zip(weights, gradients, strict=True)):
            gradient = self.sign * slope
            self.moment[i] = (1 - self.rate) * self.moment[i] + self.rate * gradient
            self.square[i] = (1 - self.second_rate) * self.square[i]
            self.square[i] += self.second_rate * gradient * gradient
            m = self.moment[i]
            v = self.square[i]
            if self.unbiased:
                m /= 1 - (1 - self.rate) ** self.steps
                v /= 1 - (1 - self.second_rate) ** self.steps
            against = weight * m / (math.sqrt(v) + 1e-10)
            flips = self.steps > self.warmup_steps and against > self.threshold
            result.append(-weight if flips else weight)
        return result


class AdamW:
    """Of the real groups: arXiv 1711.05101, algorithm 2."""

    def __init__(self, rate=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.0, maximize=False):
        self.rate = rate
        self.betas = betas
        self.eps = eps
        self.decay = decay
        self.sign = -1.0 if maximize else 1.0
        self.moment = None
        self.square = None
        self.steps = 0

    def step(self, weights, gradients):
        """Return the new weights, a list of floats."""
        if self.moment is None:
            self.moment = [0.0] * len(weights)
            self.square = [0.0] * len(weights)
        self.steps += 1
        one, two = self.betas
        result = []
        for i, (weight, slope) in enumerate(zip(weights, gradients, strict=True)):
            gradient = self.sign * slope
            self.moment[i] = one * self.moment[i] + (1 - one) * gradient
            self.square[i] = two * self.square[i] + (1 - two) * gradient * gradient
            m = self.moment[i] / (1 - one**self.steps)
            v = self.square[i] / (1 - two**self.steps)
            shrunk = weight - self.rate * self.decay * weight
            result.append(shrunk - self.rate * m / (math.sqrt(v) + self.eps))
        return result
