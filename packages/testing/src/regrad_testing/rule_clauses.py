"""Clauses about the rule itself: what it changes, that it is the reference's, and that nothing else matters."""

from __future__ import annotations

import difflib
import json
import math
import random
from collections import Counter
from typing import Any

import torch
from regrad import Correction, hookimpl
from regrad.correction import HOOK_OF_STAGE
from regrad.hookspecs import HOOKS

from regrad_testing.clauses import clause, require, require_same, same_bits, skip
from regrad_testing.references import ReferenceTraining, can_follow
from regrad_testing.settings import MORE, Settings, without_regrad

PER_STEP = {
    "gradient": "correct_gradients",
    "moment": "correct_moments",
    "weights": "predict_weights",
}


class Observer:
    """Counts hook calls, and looks at every gradient before and after `correct_gradients`."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.rebound: list[str] = []
        self.moved: list[str] = []

    def _watch(self, step: Any, hook: str) -> Any:
        self.calls[step.correction.name, hook] += 1
        before = {name: (id(g), g.data_ptr()) for name, g in _present(step)}
        weights = {
            name: p.detach().clone() for name, p in zip(step.names, step.parameters, strict=True)
        }
        result = yield
        if hook in ("correct_gradients", "correct_moments"):
            self.rebound += [
                name for name, g in _present(step) if before.get(name) != (id(g), g.data_ptr())
            ]
            pairs = zip(step.names, step.parameters, strict=True)
            self.moved += [name for name, p in pairs if not same_bits(p.detach(), weights[name])]
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
    def after_step(self, step: Any) -> Any:
        """Watch what is learnt."""
        return (yield from self._watch(step, "after_step"))


def _present(step: Any) -> list[tuple[str, Any]]:
    return [(n, g) for n, g in zip(step.names, step.gradients, strict=True) if g is not None]


def misspelt_hooks(kind: type[Correction]) -> dict[str, str]:
    """Return public methods of a correction that are nearly called like a hook, with the hook's name."""
    known = {*HOOKS, *dir(Correction)}
    public = [
        n
        for n in dir(kind)
        if not n.startswith("_") and n not in known and callable(getattr(kind, n))
    ]
    near = {name: difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85) for name in public}
    return {name: hooks[0] for name, hooks in near.items() if hooks}


class RuleClauses(Settings):
    """Clauses that every correction must satisfy in a plain loop."""

    @clause("hooks")
    def test_every_hook_runs_marked_or_not_and_none_is_misspelt(self) -> None:
        """Stages and hooks agree; each hook of its stages runs once per step; a name nearly a hook's is an error."""
        for correction in self.make():
            correction.check_class()
            for name, hook in misspelt_hooks(type(correction)).items():
                message = f"{name!r} is no hook and never called; did you mean {hook!r}? Else begin it with '_'"
                raise AssertionError(message)
        for name in self.trains_on():
            observer, training = Observer(), self.train(name)
            training.attachment.engine.registry.register(observer)
            training.run()
            for correction in training.attachment.corrections:
                acts = {"after_step", *(HOOK_OF_STAGE[stage] for stage in correction.needs.stages)}
                for hook in (
                    "predict_weights",
                    "correct_gradients",
                    "correct_moments",
                    "after_step",
                ):
                    wanted = self.problem.steps * (hook in acts and hasattr(correction, hook))
                    seen = observer.calls[correction.name, hook]
                    require(
                        seen == wanted,
                        f"on {name}, {hook!r} ran {seen} times in {self.problem.steps} steps",
                    )

    @clause("reference")
    def test_training_is_that_of_the_reference(self) -> None:
        """Weights after every step are those of the author's reference, with optimizers written out, in float64."""
        if self.reference is None:
            skip("the suite gives no reference")
        followed = [n for n, make in self.trains_on().items() if can_follow(without_regrad(make))]
        if not followed:
            skip(
                "the kit has no written-out optimizer among those of the suite; it has torch's SGD and AdamW"
            )
        if len(self.make()) > 1:
            skip("several corrections together have no single reference; each has its own suite")
        for name in followed:
            training = self.train(name)
            (correction,) = training.attachment.corrections
            told = (self.reference, correction.needs.stages, correction.options)
            wanted = ReferenceTraining(self.problem, training.optimizer, *told).run()
            for index, (got, want) in enumerate(
                zip(training.run().weights_after, wanted, strict=True)
            ):
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
                rates = [
                    metrics.get(f"{correction.name}/{s}/trigger_rate", 0.0)
                    for s in correction.needs.stages
                ]
                require(
                    any(rates), f"on {name} the effect meter saw {correction.name!r} change nothing"
                )

    @clause("no effect")
    def test_at_its_neutral_setting_it_changes_no_bit(self) -> None:
        """With the options `no_effect` training is bit for bit what it is without the correction."""
        if self.no_effect is None:
            skip("the suite names no neutral setting (no_effect)")
        for name in self.trains_on():
            neutral = self.train(name, self.no_effect).run()
            pairs = zip(neutral.weights_after, self.plain(name).weights_after, strict=True)
            for index, (got, want) in enumerate(pairs):
                require_same(
                    got, want, f"on {name}, with {dict(self.no_effect)}, after step {index}"
                )

    @clause("invariances")
    def test_neither_the_order_of_rows_nor_the_kind_of_loop_in_the_optimizer_matters(self) -> None:
        """The rows of a batch in the opposite order, and the optimizer's foreach form, give the same training."""
        for name in self.trains_on():
            self.require_as_corrected(
                name, self.train(name).run(backwards=True), "with rows in another order", MORE
            )
            try:
                foreach = self.train(name, foreach=True)
            except TypeError:  # an optimizer without such a form
                continue
            self.require_as_corrected(name, foreach.run(), "with foreach=True", MORE)

    @clause("in place")
    def test_gradients_are_changed_in_place_and_never_kept(self) -> None:
        """`.grad` stays the same tensor, weights stay where they are, and clearing in place changes nothing."""
        for name in self.trains_on():
            observer, training = Observer(), self.train(name)
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
            states = [training.correction_state() for training in (again, self.corrected(name))]
            require(
                same_bits(*states), f"on {name} the correction's state differs in a second training"
            )

    @clause("paired seeds")
    def test_no_global_random_number_is_drawn(self) -> None:
        """Attach, every step, metrics and receipt leave Python's and torch's global random numbers alone."""
        for name in self.trains_on():
            with torch.random.fork_rng(devices=[]):
                before = _global_random_state()
                training = self.train(name)
                require(
                    same_bits(before, _global_random_state()),
                    f"on {name} attaching drew a global random number",
                )
                for index in range(self.problem.steps):
                    training.run([index])
                    drawn = not same_bits(before, _global_random_state())
                    require(
                        not drawn,
                        f"on {name} a global random number was drawn in step {index}: batches differ",
                    )
                training.attachment.metrics()
                training.attachment.receipt()
                require(
                    same_bits(before, _global_random_state()),
                    f"on {name} asking for metrics drew one",
                )

    @clause("registration order")
    def test_neither_the_order_of_parameters_nor_that_of_observers_matters(self) -> None:
        """Parameters in the opposite order or in two groups, and an observer more, give the same training."""
        for name in self.trains_on():
            for order in ("reversed", "groups"):
                other = self.train(name, order=order).run()
                self.require_as_corrected(name, other, f"with the parameters {order}", MORE)
            watched = self.train(name)
            watched.attachment.engine.registry.register(Observer())
            self.require_as_corrected(name, watched.run(), "with an observer")

    @clause("report")
    def test_metrics_are_numbers_and_the_receipt_is_json(self) -> None:
        """Metrics are finite floats, the receipt goes through JSON unchanged, and `print` shows the options."""
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


def _global_random_state() -> list[Any]:
    state = [torch.get_rng_state(), list(random.getstate()[1])]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state.append(torch.cuda.get_rng_state())
    return state
