"""A plugin as somebody published it for regrad 0.1. Never edit it: what breaks it must raise the api_version."""

from dataclasses import dataclass

import torch
from regrad import Composition, Correction
from regrad.correction import Control, Needs
from regrad.errors import RegradError
from regrad.sharding import local, row_norms, total_norm


class Push(Correction):
    """Predict along the last step, halve large gradients, add to SGD's momentum."""

    name = "push"
    needs = Needs(
        stages=("weights", "gradient", "moment"),
        layouts=("plain", "ddp"),
        closures=False,
        after=("sharpen",),
        conflicts={"pull": "the two cancel"},
        warmup_steps=1,
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How far, and from which norm on."""

        distance: float = 0.5
        limit: float = 1.0
        extra: float = 0.0

        def __post_init__(self):
            if self.distance < 0:
                raise ValueError(f"distance must be at least 0, got {self.distance!r}")

    def __init__(self, **options):
        super().__init__(**options)
        self.before, self.last, self.halved = {}, {}, 0

    def setup(self, attachment):
        if not attachment.optimizer.param_groups[0].get("momentum"):
            raise RegradError("'push' needs momentum")
        attachment.reasons = (*attachment.reasons, f"'push' goes {self.options.distance}")

    def predict_weights(self, step):
        self.before = {
            n: p.detach().clone() for n, p in zip(step.names, step.parameters, strict=True)
        }
        return [
            None if n not in self.last else self.options.distance * self.last[n] for n in step.names
        ]

    def correct_gradients(self, step):
        gradients = [g for g in step.gradients if g is not None]
        if total_norm(gradients) > self.options.limit:
            self.halved += 1
            for gradient in gradients:
                local(gradient).mul_(0.5)

    def correct_moments(self, step):
        for parameter in step.parameters:
            buffer = step.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.add_(
                    self.options.extra * step.lr_of(parameter) * row_norms(buffer, None).view(())
                )

    def after_step(self, step):
        pairs = zip(step.names, step.parameters, strict=True)
        self.last = {n: p.detach() - self.before[n] for n, p in pairs if n in self.before}

    def control(self, optimizer):
        return Control(name="nesterov", optimizer={"nesterov": True})

    def metrics(self):
        return {"halved": float(self.halved)}

    def state_dict(self):
        return {"last": {n: t.clone() for n, t in self.last.items()}, "halved": self.halved}

    def load_state_dict(self, state):
        self.last, self.halved = dict(state["last"]), state["halved"]

    def idle_reason(self):
        return "nothing was pushed"

    def selects(self, name, parameter):
        return parameter.requires_grad


class Sharpen(Correction):
    """Multiply the logits that the loss sees."""

    name = "sharpen"
    needs = Needs(stages=("criterion",))

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """By how much."""

        factor: float = 2.0

    def wrap_criterion(self, criterion):
        def sharper(logits, *rest, **options):
            return criterion(self.options.factor * logits, *rest, **options)

        return sharper


class Descent(torch.optim.SGD):
    """An optimizer of the same distribution."""


both = Composition(parts=("sharpen", "push"))
