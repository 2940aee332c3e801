"""GC-ODE as the card states it: float64, one number at a time, no cleverness.

Images are nested lists [B][C][H][W] of float64 scalars, weights tensors as torch's modules hold them.
"""

import torch

EPSILON = 1e-5


def to_lists(tensor):
    return [to_lists(part) for part in tensor] if tensor.dim() else tensor


def to_tensor(lists):
    return torch.stack([to_tensor(part) for part in lists]) if isinstance(lists, list) else lists


def project(images, weights, stride):
    """Every `stride`-th pixel through a 1×1 convolution; the images themselves where there is no projection."""
    if "project.weight" not in weights:
        return images
    matrix, bias = weights["project.weight"], weights["project.bias"]
    result = []
    for image in images:
        channels = []
        for o in range(matrix.shape[0]):
            rows = []
            for y in range(0, len(image[0]), stride):
                row = []
                for x in range(0, len(image[0][0]), stride):
                    row.append(
                        bias[o]
                        + sum(matrix[o, c, 0, 0] * image[c][y][x] for c in range(len(image)))
                    )
                rows.append(row)
            channels.append(rows)
        result.append(channels)
    return result


def normalize(image, weight, bias, groups):
    size, result = len(image) // groups, []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        numbers = [pixel for c in members for row in image[c] for pixel in row]
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
        for c in members:
            result.append(
                [
                    [
                        (pixel - mean) / (variance + EPSILON) ** 0.5 * weight[c] + bias[c]
                        for pixel in row
                    ]
                    for row in image[c]
                ]
            )
    return result


def depthwise(image, weight, bias):
    height, width, result = len(image[0]), len(image[0][0]), []
    for c, channel in enumerate(image):
        rows = []
        for y in range(height):
            row = []
            for x in range(width):
                total = bias[c]
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            total = total + weight[c, 0, dy + 1, dx + 1] * channel[y + dy][x + dx]
                row.append(total)
            rows.append(row)
        result.append(rows)
    return result


def field(image, time, weights, groups):
    """dx/dt of one image: normalisation, depthwise 3×3, ReLU, time as one more channel, pointwise."""
    features = normalize(image, weights["field.norm.weight"], weights["field.norm.bias"], groups)
    features = depthwise(
        features, weights["field.depthwise.weight"], weights["field.depthwise.bias"]
    )
    features = [
        [[pixel if pixel > 0 else pixel * 0 for pixel in row] for row in channel]
        for channel in features
    ]
    features.append([[time for _ in row] for row in features[0]])
    matrix, bias, result = weights["field.pointwise.weight"], weights["field.pointwise.bias"], []
    for o in range(matrix.shape[0]):
        rows = []
        for y in range(len(features[0])):
            row = []
            for x in range(len(features[0][0])):
                row.append(
                    bias[o]
                    + sum(matrix[o, c, 0, 0] * channel[y][x] for c, channel in enumerate(features))
                )
            rows.append(row)
        result.append(rows)
    return result


def moved(image, slope, length):
    return [
        [
            [pixel + length * change for pixel, change in zip(*rows, strict=True)]
            for rows in zip(*channels, strict=True)
        ]
        for channels in zip(image, slope, strict=True)
    ]


def branch(hidden, weights, *, stride=1, groups=1):
    """One explicit midpoint step from t = 0 to t = 1, of every image."""
    result = []
    for image in project(to_lists(hidden), weights, stride):
        middle = moved(image, field(image, 0.0, weights, groups), 0.5)
        result.append(moved(image, field(middle, 0.5, weights, groups), 1.0))
    return to_tensor(result)


def pull_back(hidden, gradient, weights, **shape):
    """J_branchᵀ g."""
    start = hidden.detach().clone().requires_grad_()
    return torch.autograd.grad((branch(start, weights, **shape) * gradient).sum(), start)[0]


def strength(weight, warmup_steps, step):
    """λ of optimizer step 0, 1, 2, …."""
    return weight * min(1.0, step / warmup_steps)


def correct(gradient, extra, *, norm="free", flow="branch"):
    """The corrected gradient of h, sample by sample, of the gradient as it comes and of λ J_branchᵀ g."""
    result = []
    for r, e in zip(gradient, extra, strict=True):
        length, total = (
            sum(v * v for v in r.flatten()) ** 0.5,
            sum(v * v for v in (r + e).flatten()) ** 0.5,
        )
        if flow == "scale":
            result.append(r * (total / length if length > 0 else 1.0))
        elif norm == "keep":
            result.append((r + e) * (length / total if total > 0 else 1.0))
        else:
            result.append(r + e)
    return torch.stack(result)


def train_gradients(parts, loss, inputs, branches, factor, **options):
    """Gradients of all parameters of a chain stem, stages, head: the recursion over stages, from the last to the first.

    `branches` holds (weights, stride, groups) per stage, `factor` is λ.
    """
    stem, *stages, head = parts
    starts, ends = [], [stem(inputs)]
    for stage in stages:
        starts.append(ends[-1].detach().requires_grad_())
        ends.append(stage(starts[-1]))
    last = ends[-1].detach().requires_grad_()
    of_head = torch.autograd.grad(loss(head(last)), [last, *head.parameters()])
    gradient, result = of_head[0], list(of_head[1:])
    for stage, start, end, (weights, stride, groups) in reversed(
        list(zip(stages, starts, ends[1:], branches, strict=True))
    ):
        own = torch.autograd.grad(end, [start, *stage.parameters()], gradient)
        result = [*own[1:], *result]
        extra = factor * pull_back(start, gradient, weights, stride=stride, groups=groups)
        gradient = correct(own[0], extra, **options)
    return [*torch.autograd.grad(ends[0], list(stem.parameters()), gradient), *result]
