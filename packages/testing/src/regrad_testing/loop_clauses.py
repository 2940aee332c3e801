"""Clauses about the loops that people have: parts of batches, scalers, gaps, closures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from regrad import RegradError
from torch import Tensor, nn

from regrad_testing.clauses import (
    clause,
    refused,
    require,
    require_finite,
    require_same,
    same_bits,
    skip,
    tensors_in,
)
from regrad_testing.loops import MakeOptimizer, Training
from regrad_testing.problem import WithRareParameters, WithSparseTable
from regrad_testing.settings import MORE, Settings

SCALE = 2.0**10  # a power of two scales without rounding
OVERFLOW = 4
LOST = 52  # the batch that overflows; the learning rate is that of the step which follows


class SeveralCalls(torch.optim.Optimizer):
    """Plain gradient descent that calls its closure `calls` times per step, as line searches do."""

    def __init__(self, params: Any, lr: float = 0.1, calls: int = 2) -> None:
        super().__init__(params, {"lr": lr})
        self.calls = calls

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        """Take one step with the gradients of the last call."""
        with torch.enable_grad():
            losses = [closure() for _ in range(self.calls)]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)
        return losses[-1]


class LoopClauses(Settings):
    """Clauses that every correction must satisfy in other loops, or refuse to be in."""

    @clause("accumulation")
    def test_four_parts_of_a_batch_are_the_batch(self) -> None:
        """Four micro-batches of 8 rows give the training of batches of 32 rows."""
        for name in self.trains_on():
            in_parts = self.train(name).run(parts=4)
            self.require_as_corrected(name, in_parts, "four parts of a batch", MORE)

    @clause("scaled gradients")
    def test_a_scaled_loss_trains_as_the_plain_one(self) -> None:
        """Under a GradScaler, with fused optimizers and others, training is what it is without."""
        for name in self.trains_on():
            for form, options in self._forms(name).items():
                scaled = self.train(name, scale=SCALE, **options).run()
                self.require_as_corrected(name, scaled, f"{form}, scaled", MORE)

    @clause("skipped steps")
    def test_a_step_skipped_after_an_overflow_is_as_if_the_batch_had_not_been(self) -> None:
        """After an overflow, weights and state go on as if that batch had not been."""
        for name in self.trains_on():
            for form, options in self._forms(name).items():
                training = self.train(name, scale=SCALE, **options).run(range(OVERFLOW))
                training.step(LOST, overflow=True)
                training.run(range(OVERFLOW, self.problem.steps))
                what = f"{form}, after an overflow"
                self.require_as_corrected(name, training, what, MORE)
                got = tensors_in(training.correction_state())
                wanted = tensors_in(self.corrected(name).correction_state())
                require_same(got, wanted, f"on {name}, {what}, its state", tolerance=1e-9)

    def _forms(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the optimizer's forms that differ under a scaler."""
        forms: dict[str, dict[str, Any]] = {"not fused": {}}
        try:
            self.train(name, fused=True).attachment.detach()
        except (TypeError, RuntimeError):  # it has no such form
            return forms
        return {**forms, "fused": {"fused": True}}

    @clause("missing gradients")
    def test_frozen_parameters_and_missing_gradients_are_left_alone(self) -> None:
        """A frozen weight and parameters without gradients do not move; one may come later."""
        for name in self.trains_on():
            training = self.train(name, wrap=_with_rare_parameters)
            rare: Any = training.model
            before = training.weights()
            middle = training.problem.steps // 2
            training.run(range(middle))
            for key in ("never", "late"):
                _require_untouched(training, before, key, name)
            rare.late_is_used = True
            training.run(range(middle, training.problem.steps))
            _require_untouched_but_late(training, before, name)

    @clause("zero gradients")
    def test_gradients_of_zero_give_no_nan(self) -> None:
        """With gradients of zero, weights and states stay finite in float32 and bfloat16."""
        for name in self.trains_on():
            for dtype in (torch.float32, torch.bfloat16):
                training = self.train(name, dtype=dtype)
                for index in range(self.problem.steps):
                    weight = 0.0 if index in (0, 1, OVERFLOW) else None
                    training.run([index], weight=weight)
                what = f"on {name} in {dtype}, with gradients of zero"
                state = tensors_in(training.optimizer.state_dict()["state"])
                require_finite(training.weights(), what)
                require_finite(state, f"{what}, the optimizer's state")

    @clause("bfloat16")
    def test_a_bfloat16_model_trains_near_the_float64_one(self) -> None:
        """In bfloat16 gradients keep their dtype, and training stays near float64, as without."""
        for name in self.trains_on():
            training = self.train(name, dtype=torch.bfloat16).run()
            require_finite(training.weights(), f"on {name} in bfloat16")
            dtypes = {g.dtype for g in training.gradients().values() if g is not None}
            require(dtypes == {torch.bfloat16}, f"on {name} gradients in bfloat16 became {dtypes}")
            make = self.optimizers[name]
            plain = Training(self.problem, make, None, dtype=torch.bfloat16).run()
            far = distance(training, self.corrected(name))
            usual = distance(plain, self.plain(name))
            # what a correction adds is rounded too: some times what the loop alone loses
            require(
                far <= 0.1 + 5 * usual,
                f"on {name} bfloat16 ends {far:.2f} from float64, {usual:.2f} without",
            )

    @clause("closures")
    def test_closures_give_the_plain_loop_and_several_calls_are_borne_or_refused(self) -> None:
        """One closure call gives the plain loop; several do too where declared, or are refused."""
        for name in self.trains_on():
            self.require_as_corrected(name, self.train(name).run(closure=True), "with a closure")
        if not self.everyone(lambda correction: correction.needs.closures):
            not_refused = "several closure calls per step are not declared, but not refused"
            with refused(RegradError, not_refused):
                self._with_calls(2)
            return
        try:
            once = self._with_calls(1)
            twice = self._with_calls(2)
        except RegradError as refusal:
            skip(f"it refuses optimizers of other libraries: {refusal}")
        require(
            same_bits(once.weights_after, twice.weights_after),
            "a second closure call in a step, at the same weights, changes what the step does",
        )

    def _with_calls(self, calls: int) -> Training:
        """Return a finished training with an optimizer that calls its closure `calls` times."""

        def make(parameters: Any) -> SeveralCalls:
            return SeveralCalls(parameters, calls=calls)

        return Training(self.problem, make, self.make()).run(closure=True)

    @clause("sparse")
    def test_sparse_gradients_are_right_where_declared_and_refused_elsewhere(self) -> None:
        """A sparse gradient trains as before where `needs.sparse` says so, or is refused."""
        makes = [make for make in self.trains_on().values() if self._takes_sparse(make)]
        if not makes:
            skip("no optimizer of the suite takes sparse gradients")
        training = Training(self.problem, makes[0], self.make(), wrap=WithSparseTable)
        if self.everyone(lambda correction: correction.needs.sparse):
            _require_only_used_rows_move(training)
        else:
            _require_sparse_is_refused(training)

    def _takes_sparse(self, make: MakeOptimizer) -> bool:
        """Say whether an optimizer, without corrections, steps with sparse gradients."""
        try:
            Training(self.problem, make, None, wrap=WithSparseTable).run(range(2))
        except (RuntimeError, ValueError):
            return False
        return True


def _with_rare_parameters(net: nn.Module) -> WithRareParameters:
    """Freeze the first parameter and add those that rarely have gradients."""
    next(net.parameters()).requires_grad = False
    return WithRareParameters(net)


def _require_untouched(
    training: Training, before: Mapping[str, Tensor], key: str, name: str
) -> None:
    """Fail unless a parameter has no gradient and is where it was."""
    require(
        training.gradients()[key] is None,
        f"on {name} a gradient was made where there is none",
    )
    unmoved = same_bits(training.weights()[key], before[key])
    require(unmoved, f"on {name} a weight without gradient moved")


def _require_untouched_but_late(
    training: Training, before: Mapping[str, Tensor], name: str
) -> None:
    """Fail unless, of the rare parameters, only the late one moved."""
    after = training.weights()
    late_moved = not same_bits(after["late"], before["late"])
    require(late_moved, f"on {name} a parameter that came late is stuck")
    never_moved = same_bits(after["never"], before["never"])
    require(never_moved, f"on {name} a weight without gradient moved")
    for key, parameter in training.named_parameters().items():
        if not parameter.requires_grad:
            require(parameter.grad is None, f"on {name} a frozen parameter got a gradient")
            require(same_bits(after[key], before[key]), f"on {name} a frozen weight moved")
    require_finite(after, f"on {name}, with missing gradients")


def _require_sparse_is_refused(training: Training) -> None:
    """Fail unless a sparse gradient is refused before any weight moves."""
    before = training.weights()
    with refused(RegradError, "sparse gradients are not declared, but not refused"):
        training.run([0])
    unmoved = same_bits(training.weights(), before)
    require(unmoved, "a weight moved before the sparse gradient was refused")


def _require_only_used_rows_move(training: Training) -> None:
    """Fail unless a training with a sparse table moves the three rows that are looked up."""
    before = training.weights()["table.weight"]
    training.run()
    after = training.weights()
    require_finite(after, "with a sparse gradient")
    moved = (after["table.weight"] != before).any(1).tolist()
    require(
        moved == [True] * 3 + [False] * 2,
        f"of a sparse table rows 0 to 2 must move, got {moved}",
    )
    gradient = training.gradients()["table.weight"]
    is_sparse = gradient is not None and gradient.is_sparse
    require(is_sparse, "the sparse gradient became a dense one")


def distance(training: Training, wanted: Training) -> float:
    """Return how far the weights end apart, relative to how far they went."""
    start = _as_vector(Training(wanted.problem, torch.optim.SGD, None, lr=0.1))
    goal = _as_vector(wanted)
    apart = (_as_vector(training) - goal).norm()
    return float(apart / (goal - start).norm().clamp_min(1e-6))


def _as_vector(training: Training) -> Tensor:
    """Return all weights, in float64, one after the other."""
    return torch.cat([weight.double().flatten() for weight in training.weights().values()])
