"""The rules as in the paper, in float64, with loops."""

import math


def probabilities(norms):
    """Return norms over their sum; equal ones where all are 0."""
    total = math.fsum(norms)
    if total == 0:
        return [1 / len(norms)] * len(norms)
    return [norm / total for norm in norms]


def scores(falling, count):
    """Return (1 - P_n) / (k - n) for n = 0 to k - 1."""
    return [(1 - math.fsum(falling[:n])) / (count - n) for n in range(count)]


def certain_number(falling, count):
    """Return the first n of the least score."""
    found = scores(falling, count)
    return found.index(min(found))


def outer(gradient, row):
    return [[g * h for h in row] for g in gradient]


def total(matrices):
    """Return the sum of matrices."""
    rows, columns = len(matrices[0]), len(matrices[0][0])
    return [[math.fsum(m[i][j] for m in matrices) for j in range(columns)] for i in range(rows)]


def square(matrix):
    return math.fsum(value * value for row in matrix for value in row)


def exact(gradients, inputs):
    """Return the weight gradient."""
    return total([outer(g, h) for g, h in zip(gradients, inputs, strict=True)])


def variance(gradients, inputs, falling, order, count, certain):
    """Return E|estimate - exact|² with the first `certain` rows kept and the others drawn."""
    products = [outer(gradients[i], inputs[i]) for i in order[certain:]]
    rest = falling[certain:]
    mass = math.fsum(rest)
    squares = math.fsum(square(m) / p for m, p in zip(products, rest, strict=True))
    return (mass * squares - square(total(products))) / (count - certain)


def variance_of_uniform(gradients, inputs, count):
    """Return the same of rows chosen uniformly without replacement."""
    size = len(inputs)
    products = [outer(g, h) for g, h in zip(gradients, inputs, strict=True)]
    spread = math.fsum(square(m) for m in products) - square(total(products)) / size
    return size * (size - count) / (count * (size - 1)) * spread


def quantised(row):
    """Return a row as int8 with one scale gives it back."""
    scale = max(abs(value) for value in row) / 127
    if scale == 0:
        return [0.0] * len(row)
    return [round(value / scale) * scale for value in row]
