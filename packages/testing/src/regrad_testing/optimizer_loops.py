"""Clauses about an optimizer in the loops that people have."""

from __future__ import annotations

import copy
from typing import Any

import torch

from regrad_testing.clauses import clause, require, require_same, same_bits, skip, tensors_in
from regrad_testing.loop_clauses import LOST, OVERFLOW, SCALE
from regrad_testing.loops import Training
from regrad_testing.optimizer_rules import OptimizerSettings
from regrad_testing.rule_clauses import global_random_state
from regrad_testing.settings import MORE
from regrad_testing.state_clauses import STOP, through_a_file


class OptimizerLoops(OptimizerSettings):
    """Clauses on a model."""

    @clause("determinism")
    def test_two_trainings_are_the_same_bit_for_bit_and_draw_no_global_random_number(self) -> None:
        """A second training gives the same bits, and global random numbers are left alone."""
        for name in self.trains_on():
            before = global_random_state()
            self.require_as_corrected(name, self.train(name).run(), "a second time")
            require(
                same_bits(before, global_random_state()),
                f"on {name} a global random number was drawn: batches differ",
            )

    @clause("foreach")
    def test_foreach_gives_the_numbers_of_the_loop(self) -> None:
        """One launch for all tensors, or a loop over them: the same weights."""
        if not self.takes("foreach"):
            skip("it has no option foreach")
        self.require_as_corrected("loop", self.train("foreach").run(), "with foreach=True", MORE)

    @clause("groups")
    def test_groups_have_their_own_options_and_may_come_later(self) -> None:
        """Two groups are one, in any order; each has its own rate; one may be added later."""
        for name, make in self.trains_on().items():
            for order in ("groups", "reversed"):
                ordered = self.train(name, order=order).run()
                self.require_as_corrected(name, ordered, f"with parameters {order}", MORE)
            self._require_own_rates(name)
            self._require_later_group_trains(name, make)

    def _require_own_rates(self, name: str) -> None:
        """Fail unless a group at rate 0 stands still while the other moves."""
        halves = self.train(name, order="groups")
        halves.base_rates[1] = 0.0
        moving, still = (group["params"][0] for group in halves.optimizer.param_groups)
        moving_before = moving.detach().clone()
        still_before = still.detach().clone()
        halves.run()
        require(same_bits(still.detach(), still_before), f"on {name} a group at rate 0 moved")
        moved = not same_bits(moving.detach(), moving_before)
        require(moved, f"on {name} a group was held by another's rate")

    def _require_later_group_trains(self, name: str, make: Any) -> None:
        """Fail unless parameters stand still until the optimizer gets them, and then move."""
        model = self.problem.make_model()
        late, *rest = model.parameters()
        training = self.train(name)
        training.model = training.outer = model
        training.optimizer = make(rest)
        before = late.detach().clone()
        training.run(range(3))
        require(
            same_bits(late.detach(), before), f"on {name} a parameter moved that it was not given"
        )
        training.optimizer.add_param_group({"params": [late]})
        training.base_rates *= 2
        training.run(range(3, self.problem.steps))
        require(bool((late != before).any()), f"on {name} a group that came later did not train")

    @clause("accumulation")
    def test_four_parts_of_a_batch_are_the_batch(self) -> None:
        """Four micro-batches of 8 rows give the training of batches of 32 rows."""
        for name in self.trains_on():
            in_parts = self.train(name).run(parts=4)
            self.require_as_corrected(name, in_parts, "four parts of a batch", MORE)

    @clause("skipped steps")
    def test_a_step_skipped_after_an_overflow_is_as_if_the_batch_had_not_been(self) -> None:
        """A GradScaler changes nothing, and after an overflow training goes on as before it."""
        for name in self.trains_on():
            training = self.train(name, scale=SCALE).run(range(OVERFLOW))
            training.step(LOST, overflow=True)
            training.run(range(OVERFLOW, self.problem.steps))
            self.require_as_corrected(name, training, "after an overflow", MORE)
            got = tensors_in(training.optimizer.state_dict()["state"])
            wanted = tensors_in(self.corrected(name).optimizer.state_dict()["state"])
            require_same(got, wanted, f"on {name}, after an overflow, its state", tolerance=1e-9)

    @clause("closures")
    def test_a_closure_is_called_once_with_gradients_on_and_its_loss_is_returned(self) -> None:
        """`step(closure)` is the plain loop, under `no_grad` too, and returns its loss."""
        for name in self.trains_on():
            training = self.train(name)
            for index in range(self.problem.steps):
                training.set_rates(index)
                losses = _step_with_closure(training, index, name)
                once = len(losses) == 1
                require(once, f"on {name} the closure must be called once per step")
                training.weights_after.append(training.weights())
            self.require_as_corrected(name, training, "with a closure")

    @clause("resume")
    def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(self) -> None:
        """Model and optimizer, saved and loaded, go on to the same bits in every dtype."""
        for name in self.trains_on():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                self._require_exact_resume(name, dtype)

    def _require_exact_resume(self, name: str, dtype: torch.dtype) -> None:
        """Fail unless a training in one dtype goes on, from a file, to the same bits."""
        uninterrupted = self.train(name, dtype=dtype).run()
        first = self.train(name, dtype=dtype).run(range(STOP))
        model = through_a_file(first.model.state_dict())
        optimizer = through_a_file(first.optimizer.state_dict())
        saved = copy.deepcopy(optimizer)
        resumed = self.train(name, dtype=dtype)
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(optimizer)
        loaded = resumed.optimizer.state_dict()
        require(
            same_bits(loaded["state"], saved["state"]),
            f"on {name} in {dtype} the loaded state is another",
        )
        resumed.run(range(STOP, self.problem.steps))
        require(
            same_bits(resumed.weights_after, uninterrupted.weights_after[STOP:]),
            f"on {name} in {dtype} the resumed training is not the uninterrupted one",
        )

    @clause("attached")
    def test_under_regrad_it_takes_the_same_steps(self) -> None:
        """Attached with an empty list, training is the same bit for bit and steps are counted."""
        for name, make in self.trains_on().items():
            training = Training(self.problem, make, []).run()
            self.require_as_corrected(name, training, "attached to regrad")
            counted = training.attachment.metrics()["steps_applied"]
            require(
                counted == self.problem.steps,
                f"on {name} {counted:.0f} of {self.problem.steps} steps were seen",
            )


def _step_with_closure(training: Training, index: int, name: str) -> list[Any]:
    """Take a step with a closure, under `no_grad`; return the losses that the closure returned."""
    losses: list[Any] = []

    def closure() -> Any:
        losses.append(training.backward(index))
        return losses[-1]

    with torch.no_grad():
        returned: Any = training.optimizer.step(closure)
    require(returned is losses[-1], f"on {name} step(closure) must return the closure's loss")
    return losses
