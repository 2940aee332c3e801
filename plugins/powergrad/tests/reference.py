"""PowerGrad as the paper writes it: float64, loops, one row at a time.

p_i = exp(z_i) / sum_j exp(z_j), p'_i = p_i^a / sum_j p_j^a, and p' in place of p in the gradient.
Plain Python numbers; logits is a list of rows, target a list of classes or of rows of probabilities.
"""

import math


def softmax(row):
    largest = max(row)
    exponentials = [math.exp(z - largest) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def flattened(row, alpha):
    powers = [p**alpha for p in softmax(row)]
    return [power / sum(powers) for power in powers]


def wanted(target, classes, weight, ignore_index, label_smoothing):
    """Return what stands for q in a row: smoothed, weighted by class, all zero where the row is ignored."""
    if isinstance(target, list):
        q = target
    elif target == ignore_index:
        return [0.0] * classes
    else:
        q = [1.0 if i == target else 0.0 for i in range(classes)]
    smoothed = [(1 - label_smoothing) * q_i + label_smoothing / classes for q_i in q]
    if weight is None:
        return smoothed
    return [w * s for w, s in zip(weight, smoothed, strict=True)]


def divisor(targets, weight, ignore_index, reduction):
    if reduction != "mean":
        return 1.0
    if targets and isinstance(targets[0], list):
        return float(len(targets))
    return sum((1.0 if weight is None else weight[t]) for t in targets if t != ignore_index)


def cross_entropy(
    logits, targets, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """Return the plain loss: a number, or with "none" a list with one number per row."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(z - largest) for z in row))
        q = wanted(target, len(row), weight, ignore_index, label_smoothing)
        losses.append(sum(q_i * (log_sum - z) for q_i, z in zip(q, row, strict=True)))
    if reduction == "none":
        return losses
    return sum(losses) / divisor(targets, weight, ignore_index, reduction)


def gradient(
    logits,
    targets,
    *,
    alpha=0.25,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    upstream=1.0,
):
    """Return the logit gradient, rows of numbers; `upstream` is a number, or with "none" one per row."""
    over = divisor(targets, weight, ignore_index, reduction)
    rows = []
    for number, (row, target) in enumerate(zip(logits, targets, strict=True)):
        q = wanted(target, len(row), weight, ignore_index, label_smoothing)
        scale = (upstream[number] if isinstance(upstream, list) else upstream) / over
        rows.append(
            [scale * (sum(q) * p - q_i) for p, q_i in zip(flattened(row, alpha), q, strict=True)]
        )
    return rows
