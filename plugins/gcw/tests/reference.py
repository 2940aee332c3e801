"""GC-W for one tensor, written as the rule reads: float64, lists of numbers, loops, no cleverness.

Withdrawn paper: arXiv 2203.08345. Slots are kept as raw averages e with their counts and divided
by 1 − dⁿ when they are read; every inner product is taken from the vectors themselves.
"""

from __future__ import annotations

import math

import torch

DECAYS = {"last": 0.0, "fast": 0.9, "slow": 0.98}


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    size = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / size if size > 0 else 0.0


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


class Tensor:
    """Feed gradients to `correct`, one per optimizer step; it returns ĝ."""

    def __init__(self, size, prior, **options):
        self.names = options.get("slots", ("last", "fast", "slow"))
        self.predictor = options.get("predictor", "slot")
        self.hindsight = options.get("fit_target", "next") == "hindsight"
        self.keep = options.get("norm", "free") == "keep"
        self.gated = options.get("gate", True)
        self.warmup = options.get("warmup_steps", 10)
        self.every = options.get("fit_every", 10)
        self.prior = [prior if name == "last" else 0.0 for name in self.names]
        self.learned, self.used = list(self.prior), list(self.prior)
        self.averages = [[0.0] * size for _ in self.names]
        self.count = 0
        self.last = None
        self.pairs = []  # (g, slots, g') of this window
        self.begun = None  # hindsight: g and slots at the window's start
        self.judged = []  # per window: [(gain of the prior, gain of the learned)]
        self.step = 0
        generator = torch.Generator().manual_seed(0)
        width = len(self.names) + 3
        draws = torch.randn(8, width + 1, generator=generator, dtype=torch.float64)
        self.query, self.key = draws[:, 0].clone(), draws[:, 1:] / math.sqrt(width)
        self.scale = torch.zeros((), dtype=torch.float64)

    def slots(self):
        if self.count == 0:
            return [list(e) for e in self.averages]
        rates = [1 - DECAYS[name] ** self.count for name in self.names]
        return [[x / rate for x in e] for e, rate in zip(self.averages, rates, strict=True)]

    def correct(self, gradient):
        g = [float(x) for x in gradient]
        if self.last is not None:
            if self.step > self.warmup:
                self.pairs.append((self.last, self.slots(), g))
            for k, name in enumerate(self.names):
                d = DECAYS[name]
                self.averages[k] = [
                    d * e + (1 - d) * x for e, x in zip(self.averages[k], self.last, strict=True)
                ]
            self.count += 1
        self.last = g
        corrected = list(g)
        if self.step >= self.warmup:
            for a, slot in zip(self.used, self.slots(), strict=True):
                corrected = [c + a * (x - m) for c, x, m in zip(corrected, g, slot, strict=True)]
            if self.keep and any(self.used):
                factor = math.sqrt(dot(g, g)) / math.sqrt(dot(corrected, corrected))
                corrected = [c * factor for c in corrected]
        since = self.step - self.warmup
        if since > 0 and since % self.every == 0:
            self.fit()
        self.step += 1
        return corrected

    def fit(self):
        rows = self.pairs
        if self.hindsight:
            mean = [
                sum(column) / len(rows) for column in zip(*(pair[2] for pair in rows), strict=True)
            ]
            rows = [(*self.begun, mean)] if self.begun is not None else []
            self.begun = (self.last, self.slots())
        self.pairs = []
        gains = []
        for g, slots, later in rows:
            ways = [dot(later, minus(g, slot)) for slot in slots]
            gains.append((dot(self.prior, ways), dot(self.learned, ways)))
        self.judged = [*self.judged, gains][-5:]
        count = max(len(rows), 1)
        agree = [
            sum(cosine(r[2], minus(r[0], r[1][k])) for r in rows) / count
            for k in range(len(self.names))
        ]
        if self.predictor == "slot":
            self.learned = [
                min(2.0, max(-1.0, a + c / 2)) for a, c in zip(self.learned, agree, strict=True)
            ]
        elif self.predictor == "attention" and rows:
            self.attend(rows, agree)
        else:
            self.learned = list(self.prior) if self.predictor != "slot" else self.learned
        self.choose()

    def attend(self, rows, agree):
        members = len(self.names) + 1
        f = torch.zeros(members, members + 2, dtype=torch.float64)
        for g, slots, _ in rows:
            for k, m in enumerate([g, *slots]):
                ratio = math.log(math.sqrt(dot(m, m)) / math.sqrt(dot(g, g))) if any(m) else -10.0
                f[k, 0] += cosine(m, g) / len(rows)
                f[k, 1] += max(-10.0, min(10.0, ratio)) / len(rows)
        for k in range(members):
            f[k, 2 + k] = 1.0

        def predict(query, key, scale):
            logits = [(query * (key @ f[k])).sum() / math.sqrt(8) for k in range(members)]
            whole = sum(torch.exp(x) for x in logits)
            shares = [torch.exp(x) / whole - 1 / members for x in logits[1:]]
            return [p + scale * share for p, share in zip(self.prior, shares, strict=True)]

        module = [t.detach().clone() for t in (self.query, self.key, self.scale)]
        first, second = [0.0] * 3, [0.0] * 3
        for t in range(1, 21):
            leaves = [p.clone().requires_grad_() for p in module]
            with torch.enable_grad():
                a = predict(*leaves)
                loss = sum(
                    (x - p) ** 2 / 2 - x * c for x, p, c in zip(a, self.prior, agree, strict=True)
                )
            for i, slope in enumerate(torch.autograd.grad(loss, leaves)):
                first[i] = 0.9 * first[i] + 0.1 * slope
                second[i] = 0.999 * second[i] + 0.001 * slope**2
                root = torch.sqrt(second[i] / (1 - 0.999**t))
                module[i] = module[i] - 0.01 * first[i] / (1 - 0.9**t) / (root + 1e-8)
        self.query, self.key, self.scale = module
        self.learned = [float(a) for a in predict(*module)]

    def choose(self):
        rows = [row for window in self.judged for row in window]
        means, errors = [0.0, 0.0], [math.inf, math.inf]
        for i in range(2):
            if rows:
                means[i] = sum(row[i] for row in rows) / len(rows)
            if len(rows) > 1:
                spread = sum((row[i] - means[i]) ** 2 for row in rows) / (len(rows) - 1)
                errors[i] = math.sqrt(spread / len(rows))
        best = 1 if means[1] > means[0] else 0
        self.used = (
            [self.prior, self.learned][best]
            if means[best] >= -errors[best]
            else [0.0] * len(self.names)
        )
        if not self.gated:
            self.used = self.learned
