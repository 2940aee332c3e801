"""NAdam as it is written down, one number at a time.

Dozat, 2016, "Incorporating Nesterov Momentum into Adam", with the schedule of the momentum of its
equation for the warm-up, and with weight decay as in torch: added to the gradient, or decoupled.
"""

import math


def momentum(step, beta, momentum_decay):
    """Return the momentum of a step, counted from 1."""
    return beta * (1 - 0.5 * 0.96 ** (step * momentum_decay))


def nadam(weight, gradients, rates, betas, eps, weight_decay, momentum_decay, decoupled, maximize):
    """Return a weight after one step per gradient; a gradient of None is no step."""
    first = 0.0
    second = 0.0
    step = 0
    product = 1.0
    for given, rate in zip(gradients, rates, strict=True):
        if given is None:
            continue
        step += 1
        gradient = -given if maximize else given
        if decoupled:
            decayed = weight - rate * weight_decay * weight
        else:
            gradient = gradient + weight_decay * weight
            decayed = weight
        now = momentum(step, betas[0], momentum_decay)
        following = momentum(step + 1, betas[0], momentum_decay)
        product = product * now
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        ahead = following * first / (1 - product * following)
        ahead = ahead + (1 - now) * gradient / (1 - product)
        scale = math.sqrt(second / (1 - betas[1] ** step)) + eps
        weight = decayed - rate * ahead / scale
    return weight
