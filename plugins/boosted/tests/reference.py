"""Boosted exits as the paper writes them: float64, loops, one row at a time.

F_0 = 0, F_n = z_n + tau F_{n-1}; exit n is trained on CE(z_n + tau F_{n-1}, y) with F_{n-1} as a
constant. Plain Python numbers: logits are rows of numbers per exit, targets a list of classes.
"""

import math


def softmax(row):
    largest = max(row)
    exponentials = [math.exp(z - largest) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def predictions(exits, decay):
    """Return F_n of every exit, rows of numbers."""
    found = []
    before = [[0.0] * len(row) for row in exits[0]]
    for rows in exits:
        before = [
            [z + decay * f for z, f in zip(row, earlier, strict=True)]
            for row, earlier in zip(rows, before, strict=True)
        ]
        found.append(before)
    return found


def losses(exits, targets, *, decay):
    """Return the mean cross entropy of every exit."""
    found = []
    for rows in predictions(exits, decay):
        of_rows = [-math.log(softmax(row)[y]) for row, y in zip(rows, targets, strict=True)]
        found.append(sum(of_rows) / len(of_rows))
    return found


def gradients(exits, targets, *, decay, alpha=1.0, exit_weights=None):
    """Return the gradient of the summed mean losses with respect to every z_n, rows of numbers."""
    weights = exit_weights or [1.0] * len(exits)
    found = []
    for weight, rows in zip(weights, predictions(exits, decay), strict=True):
        slopes = []
        for row, target in zip(rows, targets, strict=True):
            p = softmax([alpha * f for f in row])
            q = [1.0 if i == target else 0.0 for i in range(len(row))]
            slopes.append(
                [weight * (p_i - q_i) / len(targets) for p_i, q_i in zip(p, q, strict=True)]
            )
        found.append(slopes)
    return found


def rescaled(stage_slopes, exit_slopes):
    """Return what each stage of a chain receives under gradient rescaling.

    Args:
        stage_slopes: d t_{i+1} / d t_i of each stage but the first, numbers.
        exit_slopes: d L_i / d t_i through exit i alone, numbers.

    Returns:
        The gradient of t_i, by the published recursion: before exit i of N the gradient is divided
        by N - i, and what comes back from the next stage is multiplied by N - i - 1.
    """
    count = len(exit_slopes)
    found = [0.0] * count
    for i in reversed(range(count)):
        from_next = stage_slopes[i] * found[i + 1] if i + 1 < count else 0.0
        found[i] = (exit_slopes[i] + (count - i - 1) * from_next) / (count - i)
    return found
