"""AdaNorm as in the paper: six optimizers with the rule inside, one tensor, float64, no cleverness (arXiv 2210.06364).

Each is algorithm 1 of its own paper as torch applies it, with one line more: the first moment takes s
where it took the gradient. Everything else, second moments and direct uses of the gradient, sees the gradient.
"""

from __future__ import annotations

import math

import torch


class Rule:
    """e ← γe + (1−γ)|g|; s = g·e/|g| if e > |g| else g."""

    def __init__(self, decay=0.95):
        self.decay, self.average = decay, 0.0

    def __call__(self, gradient):
        norm = math.sqrt(sum(x * x for x in gradient.flatten().tolist()))
        self.average = self.decay * self.average + (1 - self.decay) * norm
        if self.average > norm > 0:
            return gradient * (self.average / norm)
        return gradient


class Optimizer:
    def __init__(self, rule=None, rate=0.1, decay=0.0, decoupled=False, maximize=False):
        self.rule, self.rate, self.decay, self.decoupled = (
            rule or (lambda g: g),
            rate,
            decay,
            decoupled,
        )
        self.sign, self.steps = -1.0 if maximize else 1.0, 0

    def step(self, weight, gradient):
        gradient = self.sign * gradient
        self.steps += 1
        if self.decoupled:
            weight = weight - self.rate * self.decay * weight
        else:
            gradient = gradient + self.decay * weight
        return weight - self.rate * self.direction(gradient, self.rule(gradient))


class SGD(Optimizer):
    def __init__(self, momentum=0.9, dampening=0.0, nesterov=False, **options):
        super().__init__(**options)
        self.momentum, self.dampening, self.nesterov, self.buffer = (
            momentum,
            dampening,
            nesterov,
            None,
        )

    def direction(self, g, s):
        if self.buffer is None:
            self.buffer = s.clone()
        else:
            self.buffer = self.momentum * self.buffer + (1 - self.dampening) * s
        return g + self.momentum * self.buffer if self.nesterov else self.buffer


class Moments(Optimizer):
    def __init__(self, betas=(0.9, 0.999), eps=1e-8, **options):
        super().__init__(**options)
        self.betas, self.eps, self.first, self.second = betas, eps, 0.0, 0.0

    def update_moments(self, g, s):
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * s
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * g**2

    def unbiased_first(self):
        return self.first / (1 - self.betas[0] ** self.steps)

    def unbiased_root(self):
        return torch.sqrt(self.second / (1 - self.betas[1] ** self.steps))


class Adam(Moments):
    """Adam; with `decoupled` AdamW."""

    def __init__(self, amsgrad=False, **options):
        super().__init__(**options)
        self.amsgrad, self.largest = amsgrad, torch.zeros(())

    def direction(self, g, s):
        self.update_moments(g, s)
        second = self.second
        if self.amsgrad:
            second = self.largest = torch.maximum(self.largest, self.second)
        return self.unbiased_first() / (
            torch.sqrt(second / (1 - self.betas[1] ** self.steps)) + self.eps
        )


class NAdam(Moments):
    def __init__(self, momentum_decay=4e-3, **options):
        super().__init__(**options)
        self.momentum_decay, self.product32 = (
            momentum_decay,
            torch.ones(()),
        )  # torch keeps it in float32

    def momentum_at(self, step):
        return self.betas[0] * (1 - 0.5 * 0.96 ** (step * self.momentum_decay))

    def direction(self, g, s):
        self.update_moments(g, s)
        now, later = self.momentum_at(self.steps), self.momentum_at(self.steps + 1)
        self.product32 *= now
        product = self.product32.item()
        mean = (1 - now) * g / (1 - product) + later * self.first / (1 - product * later)
        return mean / (self.unbiased_root() + self.eps)


class RAdam(Moments):
    def direction(self, g, s):
        self.update_moments(g, s)
        longest = 2 / (1 - self.betas[1]) - 1
        power = self.betas[1] ** self.steps
        length = longest - 2 * self.steps * power / (1 - power)
        if length <= 5:
            return self.unbiased_first()
        numerator = (length - 4) * (length - 2) * longest
        rectified = math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
        return (
            rectified
            * self.unbiased_first()
            * math.sqrt(1 - power)
            / (torch.sqrt(self.second) + self.eps)
        )


class Adamax(Moments):
    def direction(self, g, s):
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * s
        self.second = torch.maximum(
            self.betas[1] * torch.as_tensor(self.second), g.abs() + self.eps
        )
        return self.unbiased_first() / self.second


def train(weight, gradient_at, optimizer, steps):
    """Return the weights after each step; `gradient_at(weight, index)` is the gradient of step `index`."""
    weights = []
    for index in range(steps):
        weight = optimizer.step(weight, gradient_at(weight, index))
        weights.append(weight)
    return weights
