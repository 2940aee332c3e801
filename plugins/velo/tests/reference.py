"""VeLO's step as published, in float64: one tensor and one feature after the other, slowly."""

from __future__ import annotations

import math

import numpy as np

DECAYS = (0.9, 0.99, 0.999)
KINDS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # widths of the features' kinds


def random_theta(seed):
    """Return random networks in the published layout, as float32 arrays."""
    generator = np.random.default_rng(seed)

    def drawn(*shape, scale):
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    def linear(inputs, outputs):
        scale = 1 / math.sqrt(inputs)
        return {"w": drawn(inputs, outputs, scale=scale), "b": drawn(outputs, scale=0.1)}

    bank = {}
    for index, width in enumerate(KINDS):
        bank[f"w0__{index}"] = drawn(256, width, 4, scale=1 / math.sqrt(30))
    bank["b0"] = drawn(256, 4, scale=0.1)
    bank["w1"] = drawn(256, 4, 4, scale=0.5)
    bank["b1"] = drawn(256, 4, scale=0.1)
    bank["w2"] = drawn(256, 4, 3, scale=0.5)
    bank["b2"] = drawn(256, 3, scale=0.1)
    return {
        "lstm_init_state": {
            "hidden": drawn(1, 512, scale=0.1),
            "cell": drawn(1, 512, scale=0.1),
        },
        "rnn_params": {
            "linear": linear(30, 512),
            "linear_1": linear(30, 512),
            "linear_2": linear(30, 512),
            "rnn/linear": linear(1024, 2048),
            "rnn_to_controls": linear(512, 256),
            "step_size": linear(512, 1),
        },
        "ff_mod_stack": {"~": bank},
    }


def in_float64(tree):
    if isinstance(tree, dict):
        return {name: in_float64(branch) for name, branch in tree.items()}
    return tree.astype(float)


def axes_of(shape):
    """The published rule, numpy's argsort, on the axes as the published layers have them."""
    backwards = np.argsort(shape[::-1], kind="stable")
    last = len(shape) - 1
    return last - int(backwards[-2]), last - int(backwards[-1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def safe(x):
    return 1 / np.sqrt(np.maximum(x, 1e-9))


def half_log(x):
    return 0.5 * np.clip(np.log(1e-8 + abs(10 * x)), -5, 5)


class Losses:
    def __init__(self, num_steps):
        self.decays = np.exp(-1 / np.logspace(1, np.log10(num_steps), 10))
        self.means = np.zeros(10)
        self.minima = np.full(10, 999999999999.0)
        self.count = 0

    def add(self, loss):
        before = self.means / (1 - self.decays ** (self.count + 1))
        largest = loss if self.count == 0 else before.max()
        loss = min(abs(largest) * 2, loss)
        self.means = self.means * self.decays + loss * (1 - self.decays)
        self.count += 1
        self.minima = np.minimum(self.minima, self.means / (1 - self.decays**self.count))

    def features(self):
        if self.count <= 2:
            return np.zeros(9)
        means = self.means / (1 - self.decays**self.count)
        low = self.minima[:-1]
        return np.clip((means[:-1] - low) / np.maximum(1e-8, means[1:] - low) - 1, -1, 1)


class VeLO:
    """Of weights in a list, all with gradients."""

    def __init__(self, theta, num_steps, pass_lstm_state=True):
        self.theta = in_float64(theta)
        self.num_steps = num_steps
        self.pass_lstm_state = pass_lstm_state
        self.losses = Losses(num_steps)
        self.iteration = 0
        self.tensors = None

    def step(self, weights, gradients, loss, lr=1.0):
        """Return the new weights, float64 arrays."""
        if self.tensors is None:
            first = self.theta["lstm_init_state"]
            self.tensors = [
                {
                    "m": [np.zeros(w.shape) for _ in DECAYS],
                    "v": np.zeros(w.shape),
                    "h": first["hidden"][0],
                    "c": first["cell"][0],
                }
                for w in weights
            ]
        self.losses.add(loss)
        inputs = []
        for weight, own in zip(weights, self.tensors, strict=True):
            inputs.append(self.of_tensor(weight, own))
        controls = self.recur(np.array(inputs))
        self.iteration += 1
        moved = []
        for index, weight in enumerate(weights):
            gradient = np.clip(gradients[index], -1000, 1000)
            mixing, factor = controls[index]
            step = self.of_weights(weight, gradient, self.tensors[index], mixing)
            moved.append(weight - lr * factor * step)
        return moved

    def of_tensor(self, weight, own):
        norm = 1 / math.sqrt(max(1e-9, np.mean(weight**2)))
        momenta = [m * norm for m in own["m"]]
        square = own["v"] * norm
        fraction = self.iteration / self.num_steps
        scales = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
        features = [math.tanh(10 * (fraction - scale)) for scale in scales]
        features += list(self.losses.features())
        features.append(half_log(square.mean()))
        rank = sum(1 for length in weight.shape if length > 1)
        features += [1.0 if rank == place else 0.0 for place in range(5)]
        features += [half_log(np.mean((m - m.mean()) ** 2)) for m in momenta]
        features += [half_log(np.mean((square - m.mean()) ** 2)) for m in momenta]
        return features

    def recur(self, inputs):
        p = self.theta["rnn_params"]

        def linear(name, x):
            return x @ p[name]["w"] + p[name]["b"]

        top = np.maximum(linear("linear_1", inputs), 0).max(axis=0)
        controls = []
        for row, own in zip(inputs, self.tensors, strict=True):
            x = np.concatenate([linear("linear_2", row) + top, own["h"]])
            i, g, f, o = np.split(linear("rnn/linear", x), 4)
            c = sigmoid(f + 1) * own["c"] + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            if self.pass_lstm_state:
                own["h"] = h
                own["c"] = c
            controls.append((linear("rnn_to_controls", h), linear("step_size", h)[0]))
        return controls

    def of_weights(self, p, g, own, mixing):
        for place, decay in enumerate(DECAYS):
            own["m"][place] = decay * own["m"][place] + (1 - decay) * g
        own["v"] = 0.999 * own["v"] + (1 - 0.999) * g * g
        m = own["m"]
        rsqrt = 1 / np.sqrt(own["v"] + 1e-6)
        fac_g, row, col, fac_m = self.factored(g, own)
        one = [[g], [np.clip(g, -0.1, 0.1)], [p], m, [own["v"]]]
        two = [[x * rsqrt for x in m], [rsqrt], fac_g, [g * rsqrt], row, col]
        roots = [[1 / np.sqrt(x + 1e-8) for x in kind] for kind in (row, col)]
        kinds = [*one, *two, *roots, fac_m]
        bank = self.theta["ff_mod_stack"]["~"]

        def mixed(name):
            return 100 * np.tensordot(mixing, bank[name], axes=1) / 256

        hidden = mixed("b0")
        for index, kind in enumerate(kinds):
            weight = mixed(f"w0__{index}")
            for place, feature in enumerate(kind):
                x = np.broadcast_to(feature, p.shape)
                x = x / np.sqrt(1e-5 + np.mean(x**2))
                hidden = hidden + x[..., None] * weight[place]
        hidden = np.maximum(np.maximum(hidden, 0) @ mixed("w1") + mixed("b1"), 0)
        out = hidden @ mixed("w2") + mixed("b2")
        size = math.sqrt(np.mean(p**2) + 1e-9)
        return size * out[..., 0] * np.exp(0.001 * out[..., 1]) * 0.001

    def factored(self, g, own):
        squares = g * g + 1e-30
        count = len(DECAYS)
        if g.ndim < 2:
            old = own.get("full", [0.0] * count)
            full = [d * x + (1 - d) * squares for d, x in zip(DECAYS, old, strict=True)]
            own["full"] = full
            fac_g = [g * safe(x + 1e-9) for x in full]
            return fac_g, full, full, [m / np.sqrt(x) for m, x in zip(own["m"], full, strict=True)]
        d1, d0 = axes_of(g.shape)
        old_rows = own.get("row", [0.0] * count)
        old_columns = own.get("col", [0.0] * count)
        rows = [
            d * x + (1 - d) * squares.mean(axis=d0) for d, x in zip(DECAYS, old_rows, strict=True)
        ]
        columns = [
            d * x + (1 - d) * squares.mean(axis=d1)
            for d, x in zip(DECAYS, old_columns, strict=True)
        ]
        own["row"] = rows
        own["col"] = columns
        reduced = d1 - 1 if d1 > d0 else d1
        factors = []
        for row, column in zip(rows, columns, strict=True):
            row_factor = safe(row / (row.mean(axis=reduced, keepdims=True) + 1e-9))
            factors.append(np.expand_dims(row_factor, d0) * np.expand_dims(safe(column), d1))
        wide_rows = [np.expand_dims(row, d0) for row in rows]
        wide_columns = [np.expand_dims(column, d1) for column in columns]
        fac_m = [m * factor for m, factor in zip(own["m"], factors, strict=True)]
        return [g * factor for factor in factors], wide_rows, wide_columns, fac_m
