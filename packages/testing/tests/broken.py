"""Corrections that are wrong on purpose, each in one way, and the clause that must catch it.

Every suite names in `caught_by` the clause meant for it. `Halved` is right. The base of all
halves gradients where the gradient of the step before pointed the same way: it has state, a
neutral setting, and is exact on shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
from regrad import Correction
from regrad.correction import Needs
from regrad.sharding import local
from regrad_testing import CorrectionSuite, OptimizerSuite

EVERYWHERE = ("plain", "ddp", "fsdp2")


class Halve(Correction):
    """g ← factor·g for elements that keep the sign of the step before; right, and the base of all that is wrong."""

    name = "halve"
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options:
        factor: float = 0.5

    def __init__(self, **options):
        super().__init__(**options)
        self.last = {}

    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            if gradient is not None:
                self.correct(step, name, local(gradient))

    def correct(self, step, name, gradient):
        sign = gradient.sign()
        if name in self.last:
            gradient.mul_(
                torch.where(sign == self.last[name], self.options.factor, 1.0).to(gradient.dtype)
            )
        self.last[name] = sign

    def state_dict(self):
        return {name: sign.clone() for name, sign in self.last.items()}

    def load_state_dict(self, state):
        self.last = {name: sign.clone() for name, sign in state.items()}


class Halved(CorrectionSuite):
    correction = Halve
    no_effect = {"factor": 1.0}
    caught_by = None
    processes = 1

    def reference(self, step):
        result = []
        for name, gradient in zip(step.names, step.gradients, strict=True):
            before, step.memory[name] = step.memory.get(name), torch.sign(gradient)
            kept = (
                torch.sign(gradient) == before
                if before is not None
                else torch.zeros_like(gradient, dtype=bool)
            )
            result.append(torch.where(kept, step.options.factor * gradient, gradient))
        return result


class TestHalved(Halved):
    processes = 2


class DoesNothing(Halve):
    def correct(self, step, name, gradient):
        gradient.mul_(1.0)


class TestDoesNothing(Halved):
    correction = DoesNothing
    reference = None
    caught_by = "effect"


class ReplacesGradients(Halve):
    """Binds a new tensor to `.grad`: a bucket of DDP, or a capture, would keep the old one."""

    def correct_gradients(self, step):
        super().correct_gradients(step)
        for parameter in step.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()


class TestReplacesGradients(Halved):
    correction = ReplacesGradients
    caught_by = "in place"


class KeepsTheGradient(Halve):
    """Keeps the gradient itself for the next step, not a copy: clearing it in place clears the memory."""

    def correct(self, step, name, gradient):
        if name in self.last:
            gradient.add_(self.last[name], alpha=0.0 if self.options.factor == 1 else 0.1)
        self.last[name] = gradient

    def load_state_dict(self, state):
        self.last = dict(state)


class TestKeepsTheGradient(Halved):
    correction = KeepsTheGradient
    reference = None
    caught_by = "in place"


class WrongAxis(Halve):
    """Compares the signs of row means where the rule has elements."""

    def correct(self, step, name, gradient):
        sign = gradient.sum(-1, keepdim=True).sign()
        if name in self.last:
            gradient.mul_(torch.where(sign == self.last[name], self.options.factor, 1.0))
        self.last[name] = sign


class TestWrongAxis(Halved):
    correction = WrongAxis
    caught_by = "reference"


class OneStepLate(Halve):
    """Begins one step too late: an index off by one."""

    def correct(self, step, name, gradient):
        if step.index <= 1:
            self.last.pop(name, None)
        super().correct(step, name, gradient)


class TestOneStepLate(Halved):
    correction = OneStepLate
    caught_by = "reference"


class LosesState(Halve):
    def state_dict(self):
        return {}


class TestLosesState(Halved):
    correction = LosesState
    caught_by = "resume"


class LendsItsState(Halve):
    """Returns its live tensors from `state_dict`, and then overwrites them."""

    def correct(self, step, name, gradient):
        kept = self.last.get(name)
        super().correct(step, name, gradient)
        if kept is not None:
            self.last[name] = kept.copy_(self.last[name])

    def state_dict(self):
        return dict(self.last)


class TestLendsItsState(Halved):
    correction = LendsItsState
    caught_by = "resume"


class ReadsWeightsWhenLoaded(Halve):
    """Saves its memory relative to the weights: right only where these are loaded before it."""

    def _weights(self):
        step = self.attachment.engine.step()
        pairs = zip(step.names, step.parameters, strict=True)
        return {name: local(parameter.detach()).sign() for name, parameter in pairs}

    def state_dict(self):
        weights = self._weights()
        return {name: sign * weights[name] for name, sign in self.last.items()}

    def load_state_dict(self, state):
        weights = self._weights()
        self.last = {name: sign * weights[name] for name, sign in state.items()}


class TestReadsWeightsWhenLoaded(Halved):
    correction = ReadsWeightsWhenLoaded
    caught_by = "resume alone"


class Shorten(Correction):
    """Δ ← factor·Δ where it goes up the gradient: right, and the base of all that is wrong with updates."""

    name = "shorten"
    needs = Needs(stages=("update",), layouts=EVERYWHERE)

    @dataclass(frozen=True, kw_only=True)
    class Options:
        factor: float = 0.5

    def correct_update(self, step):
        for displacement, gradient in zip(step.displacements, step.gradients, strict=True):
            if displacement is not None:
                self.correct(local(displacement), local(gradient))

    def correct(self, displacement, gradient):
        displacement.mul_(torch.where(displacement * gradient > 0, self.options.factor, 1.0))


class Shortened(CorrectionSuite):
    correction = Shorten
    processes = 1

    def reference(self, step):
        return [
            torch.where(
                displacement * gradient > 0, step.options.factor * displacement, displacement
            )
            for displacement, gradient in zip(step.displacements, step.gradients, strict=True)
        ]


class ShortensTheOthers(Shorten):
    """Takes what goes down the gradient: a sign too many."""

    def correct(self, displacement, gradient):
        super().correct(displacement, -gradient)


class TestShortensTheOthers(Shortened):
    correction = ShortensTheOthers
    caught_by = "reference"


class ReplacesDisplacements(Shorten):
    """Puts new tensors in place of the displacements, which nobody reads."""

    def correct_update(self, step):
        step.displacements = [
            None if displacement is None else displacement.clone()
            for displacement in step.displacements
        ]
        super().correct_update(step)


class TestReplacesDisplacements(Shortened):
    correction = ReplacesDisplacements
    caught_by = "reference"


class WritesWeights(Shorten):
    """Changes the weights beside the displacements."""

    def correct_update(self, step):
        super().correct_update(step)
        for parameter in step.parameters:
            parameter.mul_(0.999)


class TestWritesWeights(Shortened):
    correction = WritesWeights
    caught_by = "in place"


class OwnHooks(Halve):
    """Sets hooks of its own, and takes them away at detach."""

    def keep(self, attachment, *handles):
        detach = attachment.detach
        attachment.detach = lambda: (detach(), [handle.remove() for handle in handles])[0]

    def parameters_of(self, attachment):
        return [
            p
            for group in attachment.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]


class ActsOnMicroBatches(OwnHooks):
    """Halves what every backward pass leaves, where the sum is meant."""

    def setup(self, attachment):
        def halve(parameter):  # such a hook must return nothing
            parameter.grad.mul_(self.options.factor)

        hooks = [
            p.register_post_accumulate_grad_hook(halve) for p in self.parameters_of(attachment)
        ]
        self.keep(attachment, *hooks)


class TestActsOnMicroBatches(Halved):
    correction = ActsOnMicroBatches
    reference = None
    caught_by = "accumulation"


class ActsOnSkippedSteps(OwnHooks):
    """Learns in a hook of its own on the optimizer, which a skipped step fires as well."""

    def setup(self, attachment):
        self.steps = torch.zeros(())
        self.keep(attachment, attachment.optimizer.register_step_pre_hook(self.count))

    def count(self, *_):
        self.steps += 1

    def correct(self, step, name, gradient):
        if self.steps % 3 < 2:
            gradient.mul_(self.options.factor)

    def state_dict(self):
        return {"steps": self.steps.clone()}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


class TestActsOnSkippedSteps(Halved):
    correction = ActsOnSkippedSteps
    reference = None
    caught_by = "skipped steps"


class ReadsScaledGradients(OwnHooks):
    """Bounds gradients as they are made, where a scaler's factor is still in them."""

    def setup(self, attachment):
        def clamp(parameter):  # such a hook must return nothing
            parameter.grad.clamp_(-5.0, 5.0)

        hooks = [
            p.register_post_accumulate_grad_hook(clamp) for p in self.parameters_of(attachment)
        ]
        self.keep(attachment, *hooks)


class TestReadsScaledGradients(Halved):
    correction = ReadsScaledGradients
    reference = None
    caught_by = "scaled gradients"


class BreaksOnMissingGradients(Halve):
    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            self.correct(step, name, local(gradient))


class TestBreaksOnMissingGradients(Halved):
    correction = BreaksOnMissingGradients
    caught_by = "missing gradients"


class NanOnZero(Halve):
    def correct(self, step, name, gradient):
        size = gradient.norm()
        super().correct(step, name, gradient)
        gradient.mul_(size / size)


class TestNanOnZero(Halved):
    correction = NanOnZero
    tolerance = 1e-9
    caught_by = "zero gradients"


class DrawsGlobally(Halve):
    def correct(self, step, name, gradient):
        torch.rand(())
        super().correct(step, name, gradient)


class TestDrawsGlobally(Halved):
    correction = DrawsGlobally
    caught_by = "paired seeds"


class Forgetful(Halve):
    """Depends on how many of its kind were made before: another number in every run."""

    made = count()

    def __init__(self, **options):
        super().__init__(**options)
        self.number = next(self.made)

    def correct(self, step, name, gradient):
        gradient.mul_(1.0 if self.options.factor == 1 else 0.5 + 0.4 / (2 + self.number))


class TestForgetful(Halved):
    correction = Forgetful
    reference = None
    caught_by = "determinism"


class LeavesHooks(Halve):
    def setup(self, attachment):
        attachment.model.register_forward_hook(lambda *_: None)


class TestLeavesHooks(Halved):
    correction = LeavesHooks
    caught_by = "detach"


class MovesWeightsForEvaluation(OwnHooks):
    """Moves the weights itself for the forward pass, whatever mode the model is in, and restores them later."""

    def setup(self, attachment):
        self.kept, self.moves = {}, self.options.factor != 1
        self.keep(attachment, attachment.model.register_forward_pre_hook(lambda *_: self.move()))

    @torch.no_grad()
    def move(self):
        for parameter in self.attachment.model.parameters() if self.moves and not self.kept else ():
            self.kept[parameter] = parameter.detach().clone()
        for parameter, true in self.kept.items():
            parameter.copy_(1.01 * true)

    @torch.no_grad()
    def restore(self):
        for parameter, true in self.kept.items():
            parameter.copy_(true)
        self.kept = {}

    def correct_gradients(self, step):
        self.restore()
        super().correct_gradients(step)


class TestMovesWeightsForEvaluation(Halved):
    correction = MovesWeightsForEvaluation
    reference = None
    caught_by = "evaluation"


class DependsOnRegistrationOrder(Halve):
    def correct_gradients(self, step):
        for index, gradient in enumerate(step.gradients):
            if gradient is not None:
                gradient.mul_(self.options.factor ** (index % 2))


class TestDependsOnRegistrationOrder(Halved):
    correction = DependsOnRegistrationOrder
    reference = None
    caught_by = "registration order"


class MisspeltHook(Halve):
    """Would learn in `after_steps`, which has no marker and is never called."""

    def after_steps(self, step):
        self.last.clear()


class TestMisspeltHook(Halved):
    correction = MisspeltHook
    caught_by = "hooks"


class ChangesAtItsNeutralSetting(Halve):
    def correct(self, step, name, gradient):
        super().correct(step, name, gradient)
        gradient.mul_(1.0 + 1e-15)


class TestChangesAtItsNeutralSetting(Halved):
    correction = ChangesAtItsNeutralSetting
    caught_by = "no effect"


class CountsClosureCalls(Halve):
    """Declares that it bears several closure calls, and advances its memory at each."""

    needs = Needs(stages=("gradient",), layouts=EVERYWHERE, closures=True)


class TestCountsClosureCalls(Halved):
    correction = CountsClosureCalls
    caught_by = "closures"


class ClaimsSparse(Halve):
    needs = Needs(stages=("gradient",), layouts=EVERYWHERE, sparse=True)


class TestClaimsSparse(Halved):
    correction = ClaimsSparse
    caught_by = "sparse"


class WidensGradients(Halve):
    """Overflows in bfloat16: its intermediate is larger than what comes out."""

    def correct(self, step, name, gradient):
        super().correct(step, name, gradient)
        largest = torch.finfo(gradient.dtype).max
        if gradient.dtype == torch.bfloat16:
            gradient.mul_(largest).mul_(1e4).div_(largest).div_(1e4)


class TestWidensGradients(Halved):
    correction = WidensGradients
    caught_by = "bfloat16"


class PoorReport(Halve):
    def metrics(self):
        return {"size": float("nan")}


class TestPoorReport(Halved):
    correction = PoorReport
    caught_by = "report"


class CaresForTheFormOfTheOptimizer(Halve):
    def correct_gradients(self, step):
        if not step.optimizer.param_groups[0]["foreach"]:
            super().correct_gradients(step)


class TestCaresForTheFormOfTheOptimizer(Halved):
    correction = CaresForTheFormOfTheOptimizer
    caught_by = "invariances"


class DiffersOnRanks(Halve):
    """Every rank has a number of its own."""

    def correct(self, step, name, gradient):
        super().correct(step, name, gradient)
        if torch.distributed.is_initialized():
            gradient.mul_(1.0 + 0.1 * torch.distributed.get_rank())


class TestDiffersOnRanks(Halved):
    correction = DiffersOnRanks
    processes = 2
    caught_by = "ddp"


class NormOfTheShard(Halve):
    """Takes the norm of what this process holds for that of the tensor."""

    def correct(self, step, name, gradient):
        super().correct(step, name, gradient)
        gradient.mul_(1.0 if self.options.factor == 1 else 1 / (1 + gradient.norm()))


class TestNormOfTheShard(Halved):
    correction = NormOfTheShard
    reference = None
    processes = 2
    caught_by = "fsdp2"


# Optimizers: plain gradient descent with a memory, right in `Descent` and wrong in the others.


class Descent(torch.optim.Optimizer):
    """m ← .9 m + g; w ← w − lr·m."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(
            p.grad is not None and p.grad.is_sparse
            for group in self.param_groups
            for p in group["params"]
        ):
            raise RuntimeError("gradients must be dense, got a sparse one")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)
        return loss

    def move(self, parameter, group):
        state = self.state[parameter]
        state["moment"] = (
            0.9 * state["moment"] + parameter.grad if state else parameter.grad.clone()
        )
        parameter.sub_(group["lr"] * state["moment"])


class Descends(OptimizerSuite):
    optimizer = Descent
    processes = 1
    caught_by = None

    def reference(self, step):
        moments = step.memory.setdefault("moments", [torch.zeros_like(w) for w in step.weights])
        step.memory["moments"] = [0.9 * m + g for m, g in zip(moments, step.gradients, strict=True)]
        pairs = zip(step.weights, step.memory["moments"], strict=True)
        return [weight - step.options["lr"] * moment for weight, moment in pairs]


class TestDescends(Descends):
    processes = 2


class HidesItsState(Descent):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.moments = {}

    def move(self, parameter, group):
        old = self.moments.get(parameter)
        self.moments[parameter] = (
            parameter.grad.clone() if old is None else 0.9 * old + parameter.grad
        )
        parameter.sub_(group["lr"] * self.moments[parameter])


class TestHidesItsState(Descends):
    optimizer = HidesItsState
    caught_by = "resume"


class DividesByTheNorm(Descent):
    def move(self, parameter, group):
        parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


class TestDividesByTheNorm(Descends):
    optimizer = DividesByTheNorm
    reference = None
    caught_by = "zero gradients"


class KnowsOneRate(Descent):
    def move(self, parameter, group):
        super().move(parameter, self.param_groups[0])


class TestKnowsOneRate(Descends):
    optimizer = KnowsOneRate
    caught_by = "groups"


class DropsTheLoss(Descent):
    def step(self, closure=None):
        super().step(closure)


class TestDropsTheLoss(Descends):
    optimizer = DropsTheLoss
    caught_by = "closures"


class MovesWithoutGradient(Descent):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.mul_(0.999)
        return loss


class TestMovesWithoutGradient(Descends):
    optimizer = MovesWithoutGradient
    caught_by = "missing gradients"


class NeglectsMomentum(Descent):
    def move(self, parameter, group):
        parameter.sub_(group["lr"] * parameter.grad)


class TestNeglectsMomentum(Descends):
    optimizer = NeglectsMomentum
    caught_by = "reference"
