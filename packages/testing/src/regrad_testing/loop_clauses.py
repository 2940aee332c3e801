"""Clauses about the loops that people have: parts, scalers, closures, missing gradients, evaluation, resuming."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from regrad import RegradError
from torch import Tensor, nn
from torch.func import functional_call

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
from regrad_testing.settings import MORE, Settings, as_bits

SCALE = 2.0**10  # a power of two scales without rounding
OVERFLOW = 4
LOST = 52  # the batch that overflows; the learning rate is that of the step which follows
STOP = 5


class SeveralCalls(torch.optim.Optimizer):
    """Plain gradient descent that evaluates its closure `calls` times per step, as line searches do."""

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
            self.require_as_corrected(
                name, self.train(name).run(parts=4), "four parts of a batch", MORE
            )

    @clause("scaled gradients")
    def test_a_scaled_loss_trains_as_the_plain_one(self) -> None:
        """Under a GradScaler, with fused optimizers and others, training is what it is without."""
        for name in self.trains_on():
            for what, options in self._forms(name).items():
                self.require_as_corrected(
                    name, self.train(name, scale=SCALE, **options).run(), f"{what}, scaled", MORE
                )

    @clause("skipped steps")
    def test_a_step_skipped_after_an_overflow_is_as_if_the_batch_had_not_been(self) -> None:
        """After an overflow under a GradScaler weights and state go on as if that batch had not been."""
        for name in self.trains_on():
            for what, options in self._forms(name).items():
                training = self.train(name, scale=SCALE, **options).run(range(OVERFLOW))
                training.step(LOST, overflow=True)
                training.run(range(OVERFLOW, self.problem.steps))
                self.require_as_corrected(name, training, f"{what}, after an overflow", MORE)
                got, want = (
                    tensors_in(t.correction_state()) for t in (training, self.corrected(name))
                )
                require_same(
                    got, want, f"on {name}, {what}, after an overflow, its state", tolerance=1e-9
                )

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
        """A frozen weight, a parameter without gradient and one that comes later: no error, nothing moved early."""
        for name in self.trains_on():
            training = self.train(name, wrap=_with_rare_parameters)
            rare: Any = training.model
            frozen = next(rare.net.parameters())
            before, middle = training.weights(), training.problem.steps // 2
            training.run(range(middle))
            for key in ("never", "late"):
                require(
                    training.gradients()[key] is None,
                    f"on {name} a gradient was made where there is none",
                )
                same = same_bits(training.weights()[key], before[key])
                require(same, f"on {name} a weight without gradient moved")
            rare.late_is_used = True
            training.run(range(middle, training.problem.steps))
            after = training.weights()
            require(
                not same_bits(after["late"], before["late"]),
                f"on {name} a parameter that came late is stuck",
            )
            require(
                same_bits(after["never"], before["never"]),
                f"on {name} a weight without gradient moved",
            )
            require(frozen.grad is None, f"on {name} a frozen parameter got a gradient")
            key = next(n for n, p in training.named_parameters().items() if p is frozen)
            require(same_bits(after[key], before[key]), f"on {name} a frozen weight moved")
            require_finite(after, f"on {name}, with missing gradients")

    @clause("zero gradients")
    def test_gradients_of_zero_give_no_nan(self) -> None:
        """Gradients of zero, first and in between, in float32 and bfloat16, leave weights and states finite."""
        for name in self.trains_on():
            for dtype in (torch.float32, torch.bfloat16):
                training = self.train(name, dtype=dtype)
                for index in range(self.problem.steps):
                    training.run([index], weight=0.0 if index in (0, 1, OVERFLOW) else None)
                what = f"on {name} in {dtype}, with gradients of zero"
                require_finite(training.weights(), what)
                require_finite(
                    tensors_in(training.optimizer.state_dict()["state"]),
                    f"{what}, the optimizer's state",
                )

    @clause("bfloat16")
    def test_a_bfloat16_model_trains_near_the_float64_one(self) -> None:
        """In bfloat16 gradients keep their dtype, and the training stays as near to float64 as without."""
        for name in self.trains_on():
            low, plain = (
                self.train(name, dtype=torch.bfloat16).run(),
                self._plain_in(torch.bfloat16, name),
            )
            require_finite(low.weights(), f"on {name} in bfloat16")
            dtypes = {g.dtype for g in low.gradients().values() if g is not None}
            require(dtypes == {torch.bfloat16}, f"on {name} gradients in bfloat16 became {dtypes}")
            far, usual = (
                distance(t, w) for t, w in ((low, self.corrected(name)), (plain, self.plain(name)))
            )
            # what a correction adds is rounded too: some times what the loop alone loses
            require(
                far <= 0.1 + 5 * usual,
                f"on {name} bfloat16 ends {far:.2f} from float64, {usual:.2f} without",
            )

    def _plain_in(self, dtype: torch.dtype, name: str) -> Training:
        return Training(self.problem, self.optimizers[name], None, dtype=dtype).run()

    @clause("evaluation")
    def test_an_evaluation_sees_the_true_weights_and_the_users_criterion(self) -> None:
        """Between forward and step, and between steps: evaluation, criterion and state_dict are those without it."""
        for name in self.trains_on():
            training = self.train(name)
            for index in range(self.problem.steps):
                true = training.weights()
                self._evaluate(training, true, f"on {name}, before step {index}")
                training.outer(training.problem.batch(index).inputs)
                same = same_bits(as_bits(training.model.state_dict()), as_bits(true))
                require(
                    same,
                    f"on {name} a state_dict taken in step {index} does not hold the true weights",
                )
                self._evaluate(training, true, f"on {name}, within step {index}")
                training.run([index])
            self.require_as_corrected(name, training, "with evaluations in between")

    def _evaluate(self, training: Training, true: dict[str, Tensor], what: str) -> None:
        """Fail unless outputs, loss and its gradient are those of the true weights and the user's criterion."""
        batch = training.problem.batch(99)
        training.outer.eval()
        pairs = []
        for criterion in (training.criterion, type(training.problem).criterion):
            ours = criterion is training.criterion
            logits = (
                training.outer(batch.inputs)
                if ours
                else functional_call(training.model, true, (batch.inputs,))
            )
            leaf = logits.detach().requires_grad_()
            loss = criterion(leaf, batch.targets)
            pairs.append(
                {
                    "logits": logits.detach(),
                    "loss": loss,
                    "slope": torch.autograd.grad(loss, leaf)[0],
                }
            )
        training.outer.train()
        require_same(pairs[0], pairs[1], f"{what} an evaluation")

    @clause("detach")
    def test_detach_leaves_nothing_behind(self) -> None:
        """Attaching and detaching changes no bit and leaves no hook; what follows is the uncorrected training."""
        for name in self.trains_on():
            training = Training(self.problem, self.optimizers[name], None)
            before = _hooks_and_attributes(training), training.weights()
            twin = self.train(name)
            twin.attachment.detach()
            require(
                _hooks_and_attributes(twin) == before[0],
                f"on {name} attach and detach left something behind",
            )
            require(
                same_bits(twin.weights(), before[1]),
                f"on {name} attach and detach changed a weight",
            )
            twin = self.train(name).run(range(STOP))
            twin.outer(twin.problem.batch(STOP).inputs)
            twin.attachment.detach()
            left = {*_hooks_and_attributes(twin)} - {*before[0]}
            require(not left, f"on {name} detach left behind: {sorted(left)[:3]}")
            require(
                same_bits(twin.weights(), twin.weights_after[-1]),
                f"on {name} detach left moved weights",
            )
            self._continue_alone(name, twin)

    def _continue_alone(self, name: str, detached: Training) -> None:
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
        """Model, optimizer and state, saved and loaded with `weights_only`, go on to the same bits."""
        for name in self.trains_on():
            first = self.train(name).run(range(STOP))
            state = first.attachment.state_dict()
            saved = [
                through_a_file(part)
                for part in (first.model.state_dict(), first.optimizer.state_dict(), state)
            ]
            first.run(range(STOP, self.problem.steps))
            require(
                same_bits(through_a_file(state), saved[2]),
                f"on {name} what state_dict returned changed in later steps",
            )
            self.require_as_corrected(name, first, "with a state_dict taken in between")
            resumed = self.train(name)
            resumed.model.load_state_dict(saved[0])
            resumed.optimizer.load_state_dict(saved[1])
            resumed.attachment.load_state_dict(saved[2])
            again = resumed.correction_state()
            require(
                same_bits(again, saved[2]["corrections"]),
                f"on {name} the loaded state is not the saved one",
            )
            resumed.weights_after = first.weights_after[:STOP]
            self.require_as_corrected(name, resumed.run(range(STOP, self.problem.steps)), "resumed")

    @clause("resume alone")
    def test_the_optimizer_alone_resumes_the_training_bit_for_bit(self) -> None:
        """Model and optimizer, and nothing else, go on to the same bits, in any order of loading and attaching."""
        for name in self.trains_on():
            first = self.train(name).run(range(STOP))
            parts = (first.optimizer.state_dict(), first.model.state_dict())
            optimizer, model = (through_a_file(part) for part in parts)
            wanted = copy.deepcopy(first.correction_state())
            first.run(range(STOP, self.problem.steps))
            self.require_as_corrected(name, first, "with an optimizer's state_dict taken")
            saved = {"model": model, "optimizer": optimizer}
            for order in (("model", "optimizer"), ("optimizer", "model")):
                resumed = self.train(name)
                for part in order:
                    getattr(resumed, part).load_state_dict(copy.deepcopy(saved[part]))
                self._go_on(name, resumed, f"loaded {' before '.join(order)}", wanted, first)
            resumed = Training(self.problem, self.optimizers[name], None)
            for part, state in saved.items():
                getattr(resumed, part).load_state_dict(copy.deepcopy(state))
            resumed.attach(self.make())
            self._go_on(name, resumed, "loaded before attach", wanted, first)

    def _go_on(self, name: str, resumed: Training, what: str, wanted: Any, first: Training) -> None:
        """Fail unless a resumed training has the wanted state, and ends as the uninterrupted one."""
        same = same_bits(resumed.correction_state(), wanted)
        require(same, f"on {name}, {what}, the correction's state is not the saved one")
        resumed.weights_after = first.weights_after[:STOP]
        rest = resumed.run(range(STOP, self.problem.steps))
        self.require_as_corrected(name, rest, f"resumed with {what}")

    @clause("closures")
    def test_closures_give_the_plain_loop_and_several_calls_are_borne_or_refused(self) -> None:
        """A closure inside `step` gives the plain loop; several calls give it too where declared, else are refused."""
        for name in self.trains_on():
            self.require_as_corrected(name, self.train(name).run(closure=True), "with a closure")
        declared = self.everyone(lambda correction: correction.needs.closures)
        if not declared:
            with refused(
                RegradError, "several closure calls per step are not declared, but not refused"
            ):
                self._with_calls(2)
            return
        try:
            once, twice = (self._with_calls(calls) for calls in (1, 2))
        except RegradError as refusal:
            skip(f"it refuses optimizers of other libraries: {refusal}")
        same = same_bits(once.weights_after, twice.weights_after)
        require(
            same, "a second closure call in a step, at the same weights, changes what the step does"
        )

    def _with_calls(self, calls: int) -> Training:
        make = lambda parameters: SeveralCalls(parameters, calls=calls)  # noqa: E731
        return Training(self.problem, make, self.make()).run(closure=True)

    @clause("sparse")
    def test_sparse_gradients_are_right_where_declared_and_refused_elsewhere(self) -> None:
        """Where `needs.sparse` says so a sparse gradient trains as before; else the step is refused."""
        make = next((make for make in self.trains_on().values() if self._takes_sparse(make)), None)
        if make is None:
            skip("no optimizer of the suite takes sparse gradients")
        training = Training(self.problem, make, self.make(), wrap=WithSparseTable)
        before = training.weights()
        if not self.everyone(lambda correction: correction.needs.sparse):
            with refused(RegradError, "sparse gradients are not declared, but not refused"):
                training.run([0])
            require(
                same_bits(training.weights(), before),
                "a weight moved before the sparse gradient was refused",
            )
            return
        training.run()
        require_finite(training.weights(), "with a sparse gradient")
        moved = (training.weights()["table.weight"] != before["table.weight"]).any(1).tolist()
        require(
            moved == [True] * 3 + [False] * 2,
            f"of a sparse table rows 0 to 2 must move, got {moved}",
        )
        gradient = training.gradients()["table.weight"]
        require(
            gradient is not None and gradient.is_sparse, "the sparse gradient became a dense one"
        )

    def _takes_sparse(self, make: MakeOptimizer) -> bool:
        try:
            Training(self.problem, make, None, wrap=WithSparseTable).run(range(2))
        except (RuntimeError, ValueError):
            return False
        return True


def _with_rare_parameters(net: nn.Module) -> WithRareParameters:
    """Freeze the first parameter and add those that rarely have gradients."""
    next(net.parameters()).requires_grad = False
    return WithRareParameters(net)


def distance(training: Training, wanted: Training) -> float:
    """Return how far the weights end apart, relative to how far they went."""
    start = Training(wanted.problem, torch.optim.SGD, None, lr=0.1).weights()
    ends = [
        torch.cat([w.double().flatten() for w in t.weights().values()]) for t in (training, wanted)
    ]
    first = torch.cat([w.flatten() for w in start.values()])
    return float((ends[0] - ends[1]).norm() / (ends[1] - first).norm().clamp_min(1e-6))


def _hooks_and_attributes(training: Training) -> list[str]:
    """Return the names of everything set on the modules, parameters and optimizer; of hooks, how many."""
    found = []
    owners: list[tuple[str, Any]] = [
        *training.model.named_modules(),
        ("optimizer", training.optimizer),
    ]
    for owner, thing in owners:
        for key, value in vars(thing).items():
            many = isinstance(value, dict) and "hook" in key
            found += (
                [f"{owner}.{key} {number}" for number in range(len(value))]
                if many
                else [f"{owner}.{key}"]
            )
    for name, parameter in training.named_parameters().items():
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found += [
                f"{name}.{key} {number}" for number in range(len(getattr(parameter, key) or ()))
            ]
    return sorted(found)


def through_a_file(state: Any) -> Any:
    """Return what `torch.load` gives back of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
