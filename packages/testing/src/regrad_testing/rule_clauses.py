"""Clauses about the rule itself: it acts, as the reference does, and nothing else matters."""

from __future__ import annotations

import difflib
import json
import math
import random
from collections import Counter
from typing import Any

import torch
from regrad import Correction, devices, hookimpl
from regrad.correction import HOOK_OF_STAGE
from regrad.hookspecs import HOOKS
from torch import Tensor

from regrad_testing.clauses import clause, require, require_same, same_bits, skip
from regrad_testing.references import ReferenceTraining, can_follow
from regrad_testing.settings import MORE, Settings, without_regrad

HOOKS_OF_A_STEP = (
    "predict_weights",
    "correct_gradients",
    "correct_moments",
    "correct_update",
    "after_step",
)


class Observer:
    """Counts hook calls, and looks at every gradient before and after `correct_gradients`."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.rebound: list[str] = []
        self.moved: list[str] = []

    def _watch(self, step: Any, hook: str) -> Any:
        """Count a call, and keep the names of gradients replaced and weights moved by it."""
        self.calls[step.correction.name, hook] += 1
        places_before = _places_of_gradients(step)
        weights_before = _weights(step)
        result = yield
        if hook in ("correct_gradients", "correct_moments", "correct_update"):
            for name, place in _places_of_gradients(step).items():
                if places_before.get(name) != place:
                    self.rebound.append(name)
            for name, weight in _weights(step).items():
                if not same_bits(weight, weights_before[name]):
                    self.moved.append(name)
        return result

    @hookimpl(wrapper=True)
    def predict_weights(self, step: Any) -> Any:
        """Watch a prediction."""
        return (yield from self._watch(step, "predict_weights"))

    @hookimpl(wrapper=True)
    def correct_gradients(self, step: Any) -> Any:
        """Watch a correction of gradients."""
        return (yield from self._watch(step, "correct_gradients"))

    @hookimpl(wrapper=True)
    def correct_moments(self, step: Any) -> Any:
        """Watch a correction of moments."""
        return (yield from self._watch(step, "correct_moments"))

    @hookimpl(wrapper=True)
    def correct_update(self, step: Any) -> Any:
        """Watch a correction of the update."""
        return (yield from self._watch(step, "correct_update"))

    @hookimpl(wrapper=True)
    def after_step(self, step: Any) -> Any:
        """Watch what is learnt."""
        return (yield from self._watch(step, "after_step"))


def _places_of_gradients(step: Any) -> dict[str, tuple[int, int]]:
    """Return which object and which memory each gradient is."""
    pairs = zip(step.names, step.gradients, strict=True)
    return {name: (id(g), g.data_ptr()) for name, g in pairs if g is not None}


def _weights(step: Any) -> dict[str, Tensor]:
    """Return copies of the weights."""
    pairs = zip(step.names, step.parameters, strict=True)
    return {name: parameter.detach().clone() for name, parameter in pairs}


def misspelt_hooks(kind: type[Correction]) -> dict[str, str]:
    """Return public methods of a correction that are nearly named like a hook, and that hook."""
    known = {*HOOKS, *dir(Correction)}
    found = {}
    for name in dir(kind):
        if name.startswith("_") or name in known or not callable(getattr(kind, name)):
            continue
        near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
        if near:
            found[name] = near[0]
    return found


class RuleClauses(Settings):
    """Clauses that every correction must satisfy in a plain loop."""

    @clause("hooks")
    def test_every_hook_runs_marked_or_not_and_none_is_misspelt(self) -> None:
        """Stages and hooks agree, each hook runs once per step, and no hook is misspelt."""
        for correction in self.make():
            correction.check_class()
            for name, hook in misspelt_hooks(type(correction)).items():
                raise AssertionError(
                    f"{name!r} is not a hook and is never called; did you mean {hook!r}? "
                    "If not, start its name with '_'"
                )
        for name in self.trains_on():
            observer = Observer()
            training = self.train(name)
            training.attachment.engine.registry.register(observer)
            training.run()
            for correction in training.attachment.corrections:
                self._require_calls(correction, observer, name)

    def _require_calls(self, correction: Correction, observer: Observer, name: str) -> None:
        """Fail unless each hook of a correction ran once per step, and no other did."""
        acts = {"after_step", *(HOOK_OF_STAGE[stage] for stage in correction.needs.stages)}
        steps = self.problem.steps
        for hook in HOOKS_OF_A_STEP:
            seen = observer.calls[correction.name, hook]
            runs = hook in acts and hasattr(correction, hook)
            wanted = steps if runs else 0
            require(seen == wanted, f"on {name}, {hook!r} ran {seen} times in {steps} steps")

    @clause("reference")
    def test_training_is_that_of_the_reference(self) -> None:
        """Weights after every step are the reference's, in float64, with optimizers written out."""
        if self.reference is None:
            skip("the suite gives no reference")
        followed = [n for n, make in self.trains_on().items() if can_follow(without_regrad(make))]
        if not followed:
            skip(
                "the kit has no written-out optimizer among those of the suite; "
                "it has torch's SGD and AdamW"
            )
        if len(self.make()) > 1:
            skip("several corrections together have no single reference; each has its own suite")
        for name in followed:
            training = self.train(name)
            (correction,) = training.attachment.corrections
            told = (self.reference, correction.needs.stages, correction.options)
            wanted = ReferenceTraining(self.problem, training.optimizer, *told).run()
            pairs = zip(training.run().weights_after, wanted, strict=True)
            for index, (got, want) in enumerate(pairs):
                require_same(got, want, f"on {name}, after step {index}", tolerance=self.tolerance)

    @clause("effect")
    def test_it_changes_the_training_and_the_meter_sees_it(self) -> None:
        """With the effective options the weights differ, and the effect meter measured a change."""
        for name in self.trains_on():
            training = self.corrected(name)
            changed = not same_bits(training.weights_after, self.plain(name).weights_after)
            require(
                changed, f"on {name} training is, to the bit, what it is without the correction"
            )
            metrics = training.attachment.metrics()
            for correction in training.attachment.corrections:
                if correction.needs.stages == ("hidden",):
                    continue
                keys = [f"{correction.name}/{s}/trigger_rate" for s in correction.needs.stages]
                acted = any(metrics.get(key, 0.0) for key in keys)
                require(acted, f"on {name} the effect meter saw {correction.name!r} change nothing")

    @clause("no effect")
    def test_at_its_neutral_setting_it_changes_no_bit(self) -> None:
        """With the options `no_effect` training is, bit for bit, the uncorrected one."""
        if self.no_effect is None:
            skip("the suite names no neutral setting (no_effect)")
        for name in self.trains_on():
            neutral = self.train(name, self.no_effect).run()
            pairs = zip(neutral.weights_after, self.plain(name).weights_after, strict=True)
            for index, (got, want) in enumerate(pairs):
                what = f"on {name}, with {dict(self.no_effect)}, after step {index}"
                require_same(got, want, what)

    @clause("invariances")
    def test_neither_the_order_of_rows_nor_the_kind_of_loop_in_the_optimizer_matters(self) -> None:
        """Rows in the opposite order, and the optimizer's foreach form, give the same training."""
        for name in self.trains_on():
            backwards = self.train(name).run(backwards=True)
            self.require_as_corrected(name, backwards, "with rows in another order", MORE)
            try:
                foreach = self.train(name, foreach=True)
            except TypeError:  # an optimizer without such a form
                continue
            self.require_as_corrected(name, foreach.run(), "with foreach=True", MORE)

    @clause("in place")
    def test_gradients_are_changed_in_place_and_never_kept(self) -> None:
        """`.grad` stays the same tensor, no weight moves, and clearing in place changes nothing."""
        for name in self.trains_on():
            observer = Observer()
            training = self.train(name)
            training.attachment.engine.registry.register(observer)
            training.run()
            require(
                not observer.rebound,
                f"on {name} .grad was replaced, not changed in place: {observer.rebound[:3]}",
            )
            require(
                not observer.moved,
                f"on {name} weights moved while gradients were corrected: {observer.moved[:3]}",
            )
            kept = self.train(name).run(set_to_none=False)
            self.require_as_corrected(name, kept, "with zero_grad(set_to_none=False)")

    @clause("determinism")
    def test_two_trainings_are_the_same_bit_for_bit(self) -> None:
        """Weights and the correction's state are the same in a second training."""
        for name in self.trains_on():
            again = self.train(name).run()
            self.require_as_corrected(name, again, "a second time")
            same = same_bits(again.correction_state(), self.corrected(name).correction_state())
            require(same, f"on {name} the correction's state differs in a second training")

    @clause("paired seeds")
    def test_no_global_random_number_is_drawn(self) -> None:
        """Attach, steps, metrics and receipt leave the global random numbers alone."""
        for name in self.trains_on():
            with torch.random.fork_rng(devices=[]):
                self._require_nothing_drawn(name)

    def _require_nothing_drawn(self, name: str) -> None:
        """Train on one optimizer; fail when the state of a global generator changes."""
        before = global_random_state()

        def require_unchanged(message: str) -> None:
            require(same_bits(before, global_random_state()), message)

        training = self.train(name)
        require_unchanged(f"on {name} attaching drew a global random number")
        for index in range(self.problem.steps):
            training.run([index])
            require_unchanged(
                f"on {name} a global random number was drawn in step {index}: batches differ"
            )
        training.attachment.metrics()
        training.attachment.receipt()
        require_unchanged(f"on {name} asking for metrics drew one")

    @clause("registration order")
    def test_neither_the_order_of_parameters_nor_that_of_observers_matters(self) -> None:
        """Parameters in another order or two groups, or one more observer, change nothing."""
        for name in self.trains_on():
            for order in ("reversed", "groups"):
                other = self.train(name, order=order).run()
                self.require_as_corrected(name, other, f"with the parameters {order}", MORE)
            watched = self.train(name)
            watched.attachment.engine.registry.register(Observer())
            self.require_as_corrected(name, watched.run(), "with an observer")

    @clause("report")
    def test_metrics_are_numbers_and_the_receipt_is_json(self) -> None:
        """Metrics are finite floats, the receipt survives JSON, and `print` shows the options."""
        for name in self.trains_on():
            attachment = self.corrected(name).attachment
            for key, value in attachment.metrics().items():
                require(
                    type(value) is float and math.isfinite(value),
                    f"metric {key!r} must be finite, got {value!r}",
                )
            receipt = attachment.receipt()
            require(json.loads(json.dumps(receipt)) == receipt, "the receipt does not survive JSON")
            for correction in attachment.corrections:
                require(
                    repr(correction) in str(attachment),
                    f"print(attachment) does not show {correction!r}",
                )

    @clause("overhead")
    def test_the_time_in_its_hooks_is_reported(self, record_property: Any) -> None:
        """Host time in the hooks per step is reported, never asserted: machines differ."""
        for name in self.trains_on():
            training = self.corrected(name)
            seconds = sum(training.attachment.engine.seconds.values()) / self.problem.steps
            tensors = len(training.named_parameters())
            record_property(
                "said",
                f"{seconds * 1e6:.0f} µs of host time per step on {name}, {tensors} small tensors",
            )


def global_random_state() -> list[Any]:
    """Return the state of Python's and torch's global generators."""
    state = [torch.get_rng_state(), list(random.getstate()[1])]
    kind = devices.accelerator()
    if kind is not None and devices.is_in_use(kind):
        state.append(devices.random_state(torch.device(kind)))
    return state
