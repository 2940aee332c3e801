"""Clauses about an optimizer in the loops that people have."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from regrad_testing.clauses import clause, require, require_same, same_bits, skip, tensors_in
from regrad_testing.loop_clauses import LOST, OVERFLOW, SCALE
from regrad_testing.loops import Training
from regrad_testing.optimizer_rules import OptimizerSettings
from regrad_testing.settings import MORE
from regrad_testing.state_clauses import STOP, through_a_file


class OptimizerLoops(OptimizerSettings):
    """Clauses on a model."""

    @clause("determinism")
    def test_two_trainings_are_the_same_bit_for_bit_and_draw_no_global_random_number(self) -> None:
        """A second training gives the same bits, and Python's and torch's random numbers are left alone."""
        for name in self.trains_on():
            before = [torch.get_rng_state(), list(random.getstate()[1])]
            self.require_as_corrected(name, self.train(name).run(), "a second time")
            after = [torch.get_rng_state(), list(random.getstate()[1])]
            require(
                same_bits(before, after),
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
        """Two groups are one, in any order; a group has its own rate; a group added later trains."""
        for name, make in self.trains_on().items():
            for order in ("groups", "reversed"):
                self.require_as_corrected(
                    name, self.train(name, order=order).run(), f"with parameters {order}", MORE
                )
            halves = self.train(name, order="groups")
            halves.base_rates[1] = 0.0
            still, moving = (halves.optimizer.param_groups[i]["params"][0] for i in (1, 0))
            before = [p.detach().clone() for p in (still, moving)]
            halves.run()
            require(same_bits(still.detach(), before[0]), f"on {name} a group at rate 0 moved")
            require(
                not same_bits(moving.detach(), before[1]),
                f"on {name} a group was held by another's rate",
            )
            self._added_later(name, make)

    def _added_later(self, name: str, make: Any) -> None:
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
            self.require_as_corrected(
                name, self.train(name).run(parts=4), "four parts of a batch", MORE
            )

    @clause("skipped steps")
    def test_a_step_skipped_after_an_overflow_is_as_if_the_batch_had_not_been(self) -> None:
        """Under a GradScaler training is what it is without, and after an overflow goes on as if it had not been."""
        for name in self.trains_on():
            training = self.train(name, scale=SCALE).run(range(OVERFLOW))
            training.step(LOST, overflow=True)
            training.run(range(OVERFLOW, self.problem.steps))
            self.require_as_corrected(name, training, "after an overflow", MORE)
            got, want = (
                tensors_in(t.optimizer.state_dict()["state"])
                for t in (training, self.corrected(name))
            )
            require_same(got, want, f"on {name}, after an overflow, its state", tolerance=1e-9)

    @clause("closures")
    def test_a_closure_is_called_once_with_gradients_on_and_its_loss_is_returned(self) -> None:
        """`step(closure)` gives the plain loop, under `no_grad` too, and returns what the closure returned."""
        for name in self.trains_on():
            training, losses = self.train(name), list[Any]()
            for index in range(self.problem.steps):
                for group, base in zip(
                    training.optimizer.param_groups, training.base_rates, strict=True
                ):
                    group["lr"] = base * self.problem.rate(index)

                def closure(
                    index: int = index, training: Training = training, losses: list[Any] = losses
                ) -> Any:
                    losses.append(training.backward(index))
                    return losses[-1]

                with torch.no_grad():
                    returned = training.optimizer.step(closure)
                require(
                    returned is losses[-1],
                    f"on {name} step(closure) must return the closure's loss",
                )
                require(
                    len(losses) == index + 1, f"on {name} the closure must be called once per step"
                )
                training.weights_after.append(training.weights())
            self.require_as_corrected(name, training, "with a closure")

    @clause("resume")
    def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(self) -> None:
        """Model and optimizer, saved and loaded with `weights_only`, go on to the same bits in every dtype."""
        for name in self.trains_on():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                whole = self.train(name, dtype=dtype).run()
                first = self.train(name, dtype=dtype).run(range(STOP))
                parts = [
                    through_a_file(part.state_dict()) for part in (first.model, first.optimizer)
                ]
                kept = copy.deepcopy(parts[1])
                resumed = self.train(name, dtype=dtype)
                resumed.model.load_state_dict(parts[0])
                resumed.optimizer.load_state_dict(parts[1])
                again = resumed.optimizer.state_dict()
                require(
                    same_bits(again["state"], kept["state"]),
                    f"on {name} in {dtype} the loaded state is another",
                )
                resumed.run(range(STOP, self.problem.steps))
                same = same_bits(resumed.weights_after, whole.weights_after[STOP:])
                require(
                    same, f"on {name} in {dtype} the resumed training is not the uninterrupted one"
                )

    @clause("attached")
    def test_under_regrad_it_takes_the_same_steps(self) -> None:
        """Attached with an empty list the training is the same bit for bit, and every step is counted."""
        for name, make in self.trains_on().items():
            training = Training(self.problem, make, []).run()
            self.require_as_corrected(name, training, "attached to regrad")
            counted = training.attachment.metrics()["steps_applied"]
            require(
                counted == self.problem.steps,
                f"on {name} {counted:.0f} of {self.problem.steps} steps were seen",
            )
