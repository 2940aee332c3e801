"""XGrad as in the paper: loops over scalars' tensors, float64, no cleverness (arXiv 2305.18240, algorithm 1).

Every optimizer is written out here with its own state; `direction` is D, what the next step would
subtract, per unit of learning rate, if the state did not change any more.
"""

from __future__ import annotations

import math

import torch


class SGD:
    def __init__(self, momentum=0.9, dampening=0.0, decay=0.0, maximize=False):
        self.momentum, self.dampening, self.decay, self.sign = (
            momentum,
            dampening,
            decay,
            -1.0 if maximize else 1.0,
        )
        self.buffer = None

    def step(self, weight, gradient, rate):
        gradient = self.sign * gradient + self.decay * weight
        if self.buffer is None:
            self.buffer = gradient.clone()
        else:
            self.buffer = self.momentum * self.buffer + (1 - self.dampening) * gradient
        return weight - rate * self.buffer

    def direction(self):
        return self.buffer


class RMSprop:
    def __init__(
        self, alpha=0.99, eps=1e-8, decay=0.0, momentum=0.0, centered=False, maximize=False
    ):
        self.alpha, self.eps, self.decay, self.momentum, self.centered = (
            alpha,
            eps,
            decay,
            momentum,
            centered,
        )
        self.sign = -1.0 if maximize else 1.0
        self.square = self.mean = self.buffer = 0.0
        self.last = None

    def step(self, weight, gradient, rate):
        gradient = self.sign * gradient + self.decay * weight
        self.square = self.alpha * self.square + (1 - self.alpha) * gradient**2
        variance = self.square
        if self.centered:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * gradient
            variance = variance - self.mean**2
        self.last = gradient / (torch.sqrt(variance) + self.eps)
        if self.momentum > 0:
            self.buffer = self.momentum * self.buffer + self.last
            self.last = self.buffer
        return weight - rate * self.last

    def direction(self):
        return self.last


class Adam:
    def __init__(
        self,
        betas=(0.9, 0.999),
        eps=1e-8,
        decay=0.0,
        decoupled=False,
        amsgrad=False,
        maximize=False,
    ):
        self.betas, self.eps, self.decay, self.decoupled, self.amsgrad = (
            betas,
            eps,
            decay,
            decoupled,
            amsgrad,
        )
        self.sign = -1.0 if maximize else 1.0
        self.first = self.second = 0.0
        self.largest = None
        self.steps = 0

    def step(self, weight, gradient, rate):
        gradient = self.sign * gradient
        if self.decoupled:
            weight = weight - rate * self.decay * weight
        else:
            gradient = gradient + self.decay * weight
        self.steps += 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * gradient
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * gradient**2
        self.largest = (
            self.second if self.largest is None else torch.maximum(self.largest, self.second)
        )
        return weight - rate * self.direction()

    def direction(self):
        if self.steps == 0:
            return None
        second = self.largest if self.amsgrad else self.second
        first_unbiased = self.first / (1 - self.betas[0] ** self.steps)
        root = torch.sqrt(second) / math.sqrt(1 - self.betas[1] ** self.steps)
        return first_unbiased / (root + self.eps)


class AdaM3:
    def __init__(self, betas=(0.9, 0.999), eps=1e-16, decay=0.0, maximize=False):
        self.betas, self.eps, self.decay, self.sign = betas, eps, decay, -1.0 if maximize else 1.0
        self.first = self.second = 0.0
        self.steps = 0

    def step(self, weight, gradient, rate):
        self.steps += 1
        weight = weight - rate * self.decay * weight
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * self.sign * gradient
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * self.first**2 + self.eps
        return weight - rate * self.direction()

    def direction(self):
        if self.steps == 0:
            return None
        root = torch.sqrt(self.second / (1 - self.betas[1] ** self.steps))
        return self.first / (1 - self.betas[0] ** self.steps) / root


class AdaBelief:
    def __init__(
        self,
        betas=(0.9, 0.999),
        eps=1e-16,
        decay=0.0,
        decoupled=True,
        ams_bound=False,
        maximize=False,
    ):
        self.betas, self.eps, self.decay, self.decoupled, self.ams_bound = (
            betas,
            eps,
            decay,
            decoupled,
            ams_bound,
        )
        self.sign = -1.0 if maximize else 1.0
        self.first = self.variance = 0.0
        self.largest = torch.zeros((), dtype=torch.float64)
        self.steps = 0

    def step(self, weight, gradient, rate):
        gradient = self.sign * gradient
        self.steps += 1
        if self.decoupled:
            weight = weight - rate * self.decay * weight
        else:
            gradient = gradient + self.decay * weight
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * gradient
        self.variance = (
            self.betas[1] * self.variance
            + (1 - self.betas[1]) * (gradient - self.first) ** 2
            + self.eps
        )
        self.largest = torch.maximum(self.largest, self.variance)
        return weight - rate * self.direction()

    def direction(self):
        if self.steps == 0:
            return None
        variance = self.largest if self.ams_bound else self.variance
        root = torch.sqrt(variance / (1 - self.betas[1] ** self.steps))
        return self.first / (1 - self.betas[0] ** self.steps) / (root + self.eps)


def train_from_displacement(weight, gradient_at, optimizer, rates, horizon, decay, has_gradient):
    """Return the same where the last displacement stands for s·η·D: for any optimizer, of which nothing is read.

    A step without a gradient (`has_gradient` False) leaves the weight alone: it has no decay, and
    the next step nothing to predict from.
    """
    weights, points = [], []
    last, last_rate = torch.zeros_like(weight), 1.0
    for rate, made in zip(rates, has_gradient, strict=True):
        point = weight + horizon * (rate / last_rate) * last
        before = weight
        last = torch.zeros_like(weight)
        if made:
            weight = optimizer.step(before, gradient_at(point), rate)
            last = (weight - before) + rate * decay * before
        last_rate = rate
        points.append(point)
        weights.append(weight)
    return weights, points


def train(weight, gradient_at, optimizer, rates, horizon):
    """Return the weights after each step, and the points at which gradients were taken."""
    weights, points = [], []
    for rate in rates:
        direction = optimizer.direction()
        point = weight.clone() if direction is None else weight - horizon * rate * direction
        weight = optimizer.step(weight, gradient_at(point), rate)
        points.append(point)
        weights.append(weight)
    return weights, points
