"""Clauses about state: what an evaluation sees, what detach leaves, what a checkpoint restores."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from regrad_testing.clauses import clause, require, require_same, same_bits
from regrad_testing.loops import Training
from regrad_testing.settings import Settings, as_bits

STOP = 5


class StateClauses(Settings):
    """Clauses that every correction must satisfy beside a training and after it."""

    @clause("evaluation")
    def test_an_evaluation_sees_the_true_weights_and_the_users_criterion(self) -> None:
        """Evaluation, criterion and state_dict are, at any moment, those without the correction."""
        for name in self.trains_on():
            training = self.train(name)
            for index in range(self.problem.steps):
                # The first forward of a step predicts with the rate that the step will have.
                training.set_rates(index)
                true = training.weights()
                _require_true_evaluation(training, true, f"on {name}, before step {index}")
                training.outer(training.problem.batch(index).inputs)
                held = as_bits(training.model.state_dict())
                require(
                    same_bits(held, as_bits(true)),
                    f"on {name} a state_dict taken in step {index} does not hold the true weights",
                )
                _require_true_evaluation(training, true, f"on {name}, within step {index}")
                training.run([index])
            self.require_as_corrected(name, training, "with evaluations in between")

    @clause("detach")
    def test_detach_leaves_nothing_behind(self) -> None:
        """Attach and detach change no bit and leave no hook; then training is uncorrected."""
        for name in self.trains_on():
            plain = Training(self.problem, self.optimizers[name], None)
            traces = _hooks_and_attributes(plain)
            self._require_no_trace_at_once(name, plain, traces)
            training = self.train(name).run(range(STOP))
            training.outer(training.problem.batch(STOP).inputs)
            training.attachment.detach()
            left = {*_hooks_and_attributes(training)} - {*traces}
            require(not left, f"on {name} detach left behind: {sorted(left)[:3]}")
            require(
                same_bits(training.weights(), training.weights_after[-1]),
                f"on {name} detach left moved weights",
            )
            self._require_uncorrected_from_here(name, training)

    def _require_no_trace_at_once(self, name: str, plain: Training, traces: list[str]) -> None:
        """Fail unless attach and detach, with no step between, leave everything unchanged."""
        twin = self.train(name)
        twin.attachment.detach()
        require(
            _hooks_and_attributes(twin) == traces,
            f"on {name} attach and detach left something behind",
        )
        require(
            same_bits(twin.weights(), plain.weights()),
            f"on {name} attach and detach changed a weight",
        )

    def _require_uncorrected_from_here(self, name: str, detached: Training) -> None:
        """Fail unless a detached training goes on as one that never had the correction."""
        other = Training(self.problem, self.optimizers[name], None)
        other.model.load_state_dict(detached.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(detached.optimizer.state_dict()))
        detached.weights_after.clear()
        detached.criterion = detached.attachment.criterion
        for training in (detached, other):
            training.run(range(STOP, self.problem.steps))
        same = same_bits(detached.weights_after, other.weights_after)
        require(same, f"on {name} training after detach is not the uncorrected one")

    @clause("resume")
    def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(self) -> None:
        """Model, optimizer and state, saved and loaded, go on to the same bits."""
        for name in self.trains_on():
            first = self.train(name).run(range(STOP))
            state = first.attachment.state_dict()
            model = through_a_file(first.model.state_dict())
            optimizer = through_a_file(first.optimizer.state_dict())
            saved = through_a_file(state)
            first.run(range(STOP, self.problem.steps))
            require(
                same_bits(through_a_file(state), saved),
                f"on {name} what state_dict returned changed in later steps",
            )
            self.require_as_corrected(name, first, "with a state_dict taken in between")
            resumed = self.train(name)
            resumed.model.load_state_dict(model)
            resumed.optimizer.load_state_dict(optimizer)
            resumed.attachment.load_state_dict(saved)
            require(
                same_bits(resumed.correction_state(), saved["corrections"]),
                f"on {name} the loaded state is not the saved one",
            )
            self._require_same_end(name, resumed, first, "resumed")

    @clause("resume alone")
    def test_the_optimizer_alone_resumes_the_training_bit_for_bit(self) -> None:
        """Model and optimizer alone go on to the same bits, loaded and attached in any order."""
        for name in self.trains_on():
            first = self.train(name).run(range(STOP))
            saved = {
                "optimizer": through_a_file(first.optimizer.state_dict()),
                "model": through_a_file(first.model.state_dict()),
            }
            state = copy.deepcopy(first.correction_state())
            first.run(range(STOP, self.problem.steps))
            self.require_as_corrected(name, first, "with an optimizer's state_dict taken")
            for order in (("model", "optimizer"), ("optimizer", "model")):
                resumed = self.train(name)
                _load(resumed, saved, order)
                what = f"loaded {' before '.join(order)}"
                _require_state(name, resumed, state, what)
                self._require_same_end(name, resumed, first, f"resumed with {what}")
            resumed = Training(self.problem, self.optimizers[name], None)
            _load(resumed, saved, ("model", "optimizer"))
            resumed.attach(self.make())
            _require_state(name, resumed, state, "loaded before attach")
            self._require_same_end(name, resumed, first, "resumed with loaded before attach")

    def _require_same_end(self, name: str, resumed: Training, first: Training, what: str) -> None:
        """Take the steps that are left; fail unless the training ends as the uninterrupted one."""
        resumed.weights_after = first.weights_after[:STOP]
        resumed.run(range(STOP, self.problem.steps))
        self.require_as_corrected(name, resumed, what)


def _load(training: Training, saved: Mapping[str, Any], order: tuple[str, str]) -> None:
    """Load model and optimizer, in an order."""
    for part in order:
        getattr(training, part).load_state_dict(copy.deepcopy(saved[part]))


def _require_state(name: str, resumed: Training, state: Any, what: str) -> None:
    """Fail unless the correction has the state that was saved."""
    same = same_bits(resumed.correction_state(), state)
    require(same, f"on {name}, {what}, the correction's state is not the saved one")


def _require_true_evaluation(training: Training, true: dict[str, Tensor], what: str) -> None:
    """Fail unless outputs and loss are those of the true weights and the user's criterion."""
    batch = training.problem.batch(99)
    training.outer.eval()
    seen = _judged(training.outer(batch.inputs), training.criterion, batch.targets)
    logits = functional_call(training.model, true, (batch.inputs,))
    wanted = _judged(logits, type(training.problem).criterion, batch.targets)
    training.outer.train()
    require_same(seen, wanted, f"{what} an evaluation")


def _judged(logits: Any, criterion: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return logits, their loss, and its gradient with respect to them; several if there are."""
    copies = tree_map(lambda each: each.detach().requires_grad_(), logits)
    loss = criterion(copies, targets)
    leaves = tree_leaves(copies)
    slopes = torch.autograd.grad(loss, leaves)
    found = {"loss": loss.detach()}
    for number, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        found[f"logits {number}"] = leaf.detach()
        found[f"slope {number}"] = slope
    return found


def _hooks_and_attributes(training: Training) -> list[str]:
    """Return a name for every attribute and every hook of modules, parameters and optimizer."""
    found = []
    owners: list[tuple[str, Any]] = [*training.model.named_modules()]
    owners.append(("optimizer", training.optimizer))
    for owner, thing in owners:
        for key, value in vars(thing).items():
            if isinstance(value, dict) and "hook" in key:
                found += [f"{owner}.{key} {number}" for number in range(len(value))]
            else:
                found.append(f"{owner}.{key}")
    for name, parameter in training.named_parameters().items():
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(parameter, key) or ()
            found += [f"{name}.{key} {number}" for number in range(len(hooks))]
    return sorted(found)


def through_a_file(state: Any) -> Any:
    """Return what `torch.load` reads of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
