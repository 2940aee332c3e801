"""Clauses about an optimizer's own rule, on tensors whose gradients are given."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_testing.clauses import (
    clause,
    require,
    require_finite,
    require_same,
    skip,
    tensors_in,
)
from regrad_testing.loops import MakeOptimizer, Training
from regrad_testing.settings import SuiteBase

SHAPES = ((3,), (2, 5), (), (4, 0))
STEPS = 12


@dataclass
class OptimizerStep:
    """What a `reference` of an optimizer is given. Tensors are float64.

    Attributes:
        index: Steps before this one.
        options: The optimizer's options, those of its parameter group.
        weights: Before the step.
        gradients: Of the step.
        memory: Empty at the beginning of a training, and kept from call to call.
    """

    index: int
    options: Mapping[str, Any]
    weights: list[Tensor]
    gradients: list[Tensor]
    memory: dict[Any, Any]


class Unmoved(Exception):  # noqa: N818 - no error: refusing is one of two right answers
    """An optimizer refused a gradient and moved nothing."""


class OptimizerSettings(SuiteBase):
    """The attributes of a suite for optimizers."""

    optimizer: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {"lr": 0.01}
    variants: ClassVar[Iterable[Mapping[str, Any]]] = ()
    reference: ClassVar[Callable[[Any, OptimizerStep], Any] | None] = None
    layouts: ClassVar[tuple[str, ...]] = ("ddp", "fsdp2")

    @classmethod
    def make(cls, parameters: Any, **options: Any) -> Optimizer:
        """Return a new optimizer; `options` win over those of the suite."""
        given = inspect.getattr_static(cls, "optimizer", None)
        given = given.__func__ if isinstance(given, staticmethod) else given
        require(
            given is not None,
            f"{cls.__name__} must set optimizer: a class, or a function of parameters",
        )
        return given(parameters, **{**cls.options, **options})  # type: ignore[no-any-return]

    @classmethod
    def takes(cls, option: str) -> bool:
        """Say whether the optimizer has an option."""
        return option in cls.make([nn.Parameter(torch.zeros(1))]).defaults

    @classmethod
    def forms(cls) -> list[dict[str, Any]]:
        """Return the options for a loop over tensors, and for one launch for all of them."""
        if cls.takes("foreach"):
            return [{"foreach": False}, {"foreach": True}]
        return [{}]

    @classmethod
    def trains_on(cls) -> dict[str, MakeOptimizer]:
        """Return the optimizer in each of its forms."""
        names = {False: "loop", True: "foreach", None: "plain"}
        return {
            names[form.get("foreach")]: functools.partial(cls.make, **form) for form in cls.forms()
        }

    @classmethod
    def train(cls, name: str, options: Mapping[str, Any] | None = None, **how: Any) -> Training:
        """Return a training with the optimizer, before its first step; nothing is attached."""
        return Training(cls.problem, cls.trains_on()[name], None, **{**(options or {}), **how})

    @classmethod
    def declared_layouts(cls) -> set[str]:
        """Return the layouts on which two processes must train as one."""
        return {*cls.layouts}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Return parameters of several shapes, one of them empty, the same every time."""
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    return [nn.Parameter(value.to(dtype)) for value in values]


def give_gradients(weights: list[nn.Parameter], index: int, sign: float = 1.0) -> list[Tensor]:
    """Set and return gradients that depend on the step alone, with norms that rise and fall."""
    generator = torch.Generator().manual_seed(100 + index)
    for weight in weights:
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = (sign * (1.0, 2.0, 0.05)[index % 3] * gradient).to(weight.dtype)
    return [weight.grad for weight in weights if weight.grad is not None]


def named(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors by their numbers."""
    return {f"tensor {index}": tensor.detach().clone() for index, tensor in enumerate(tensors)}


class OptimizerRules(OptimizerSettings):
    """Clauses on tensors whose gradients are given."""

    def _steps(self, count: int = STEPS, sign: float = 1.0, **options: Any) -> list[nn.Parameter]:
        """Return the parameters after some steps."""
        weights = parameters()
        optimizer = self.make(weights, **options)
        for index in range(count):
            give_gradients(weights, index, sign)
            optimizer.step()
        return weights

    @clause("reference")
    def test_the_first_steps_are_those_of_the_reference(self) -> None:
        """Weights after every step are the reference's, in float64, for every variant and form."""
        if self.reference is None:
            skip("the suite gives no reference")
        for variant in ({}, *self.variants):
            for form in self.forms():
                self._follow({**variant, **form})

    def _follow(self, options: dict[str, Any]) -> None:
        """Fail unless the optimizer, with some options, goes where the reference goes."""
        weights = parameters()
        wanted = [weight.detach().clone() for weight in weights]
        optimizer = self.make(weights, **options)
        memory: dict[Any, Any] = {}
        for index in range(STEPS):
            gradients = [gradient.clone() for gradient in give_gradients(weights, index)]
            step = OptimizerStep(index, optimizer.param_groups[0], wanted, gradients, memory)
            wanted = self.reference(step)  # type: ignore[misc]
            optimizer.step()
            what = f"with {options or self.options}, after step {index}"
            require_same(named(weights), named(wanted), what, scale=self.tolerance)

    @clause("effect")
    def test_a_step_moves_every_weight_that_has_a_gradient(self) -> None:
        """After one step no weight is where it was; after a step at rate 0 all are."""
        for form in self.forms():
            before, after = parameters(), self._steps(1, **form)
            moved = all(bool((a != b).all()) for a, b in zip(after, before, strict=True))
            require(moved, f"with {form} a weight with a gradient did not move")
            still = self._steps(1, **form, lr=0.0)
            require_same(named(still), named(before), f"with {form}, at learning rate 0")

    @clause("maximize")
    def test_maximize_is_descent_on_the_negative(self) -> None:
        """Climbing along a gradient is descending along its negative."""
        if not self.takes("maximize"):
            skip("it has no option maximize")
        for form in self.forms():
            climbed = named(self._steps(maximize=True, **form))
            descended = named(self._steps(sign=-1.0, **form))
            require_same(climbed, descended, f"with {form}, maximize", scale=1e-14)

    @clause("weight decay")
    def test_weight_decay_pulls_towards_zero(self) -> None:
        """With gradients of zero, weights stand still without decay, and shrink with it."""
        if not self.takes("weight_decay"):
            skip("it has no option weight_decay")
        for form in self.forms():
            said = f"with {form}, decay %s and gradients of zero, weights must be %s"
            kept = self._ratios(weight_decay=0.0, **form)
            require(bool((kept == 1).all()), said % (0.0, "kept"))
            shrunk = self._ratios(weight_decay=0.1, **form)
            require(bool(((shrunk < 1) & (shrunk > 0)).all()), said % (0.1, "shrunk"))

    def _ratios(self, **options: Any) -> Tensor:
        """Return every weight after a step with gradients of zero, relative to what it was."""
        weights = parameters()
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        self.make(weights, **options).step()
        pairs = zip(weights, parameters(), strict=True)
        return torch.cat([(after / before).flatten() for after, before in pairs]).detach()

    @clause("zero gradients")
    def test_gradients_of_zero_give_no_nan(self) -> None:
        """With gradients of zero, weights and state stay finite in every dtype."""
        for form in self.forms():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                self._require_finite_steps(dtype, form)

    def _require_finite_steps(self, dtype: torch.dtype, form: dict[str, Any]) -> None:
        """Take steps, some of them with gradients of zero; fail unless all stays finite."""
        weights = parameters(dtype)
        optimizer = self.make(weights, **form)
        what = f"with {form} in {dtype}, with gradients of zero"
        for index in range(STEPS):
            give_gradients(weights, index, 0.0 if index in (0, 1, 5) else 1.0)
            optimizer.step()
            require_finite(named(weights), what)
            require_finite(tensors_in(optimizer.state_dict()["state"]), f"{what}, its state")

    @clause("dtypes")
    def test_a_bfloat16_parameter_stays_near_the_float64_one(self) -> None:
        """In bfloat16 and float32 weights keep their dtype and follow float64 closely."""
        wanted = named(self._steps())
        for form in self.forms():
            for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
                weights = parameters(dtype)
                optimizer = self.make(weights, **form)
                for index in range(STEPS):
                    give_gradients(weights, index)
                    optimizer.step()
                dtypes = {weight.dtype for weight in weights}
                require(dtypes == {dtype}, f"with {form} weights of {dtype} changed their dtype")
                got = {name: weight.double() for name, weight in named(weights).items()}
                require_same(got, wanted, f"with {form} in {dtype}", scale=bound)

    @clause("missing gradients")
    def test_parameters_without_gradient_are_left_alone(self) -> None:
        """Without gradient no weight moves, decays or gets state; a gradient may come later."""
        decay = {"weight_decay": 0.1} if self.takes("weight_decay") else {}
        for form in self.forms():
            weights = parameters()
            frozen, late = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
            frozen.requires_grad = False
            optimizer = self.make([*weights, frozen, late], **form, **decay)
            for index in range(4):
                give_gradients(weights, index)
                optimizer.step()
            for what, alone in (("a frozen", frozen), ("a", late)):
                told = f"with {form} {what} parameter without gradient"
                require(bool((alone == 1).all()), f"{told} moved")
                require(not optimizer.state.get(alone), f"{told} got state")
            give_gradients([*weights, late], 4)
            optimizer.step()
            moved = bool((late != 1).all())
            require(moved, f"with {form} a parameter whose gradient came later did not move")

    @clause("copies")
    def test_copies_and_pickles_step_as_the_original(self) -> None:
        """`copy.deepcopy` and pickle of an optimizer with its parameters take the same steps."""
        for form in self.forms():
            weights = parameters()
            optimizer = self.make(weights, **form)
            for index in range(4):
                give_gradients(weights, index)
                optimizer.step()
            twins = [
                copy.deepcopy((weights, optimizer)),
                pickle.loads(pickle.dumps((weights, optimizer))),  # noqa: S301 - made here
            ]
            for own, copied in ((weights, optimizer), *twins):
                for index in range(4, 8):
                    give_gradients(own, index)
                    copied.step()
            for twin, _ in twins:
                require_same(named(twin), named(weights), f"with {form} a copy")

    @clause("tensor rate")
    def test_a_tensor_learning_rate_gives_the_numbers_of_a_float(self) -> None:
        """The learning rate may be a tensor of one element."""
        rate = float(self.options.get("lr", 0.01))
        for form in self.forms():
            try:
                got = named(self._steps(**form, lr=torch.tensor(rate, dtype=torch.float64)))
            except (TypeError, ValueError) as refusal:
                skip(f"it refuses a tensor: {refusal}")
            wanted = named(self._steps(**form, lr=rate))
            require_same(got, wanted, f"with {form}, a tensor rate", scale=1e-14)

    @clause("complex and sparse")
    def test_what_it_has_no_rule_for_is_refused_before_anything_moves(self) -> None:
        """Complex weights and sparse gradients are refused, or train as real and dense ones."""
        for form in self.forms():
            self._require_complex_as_real(form)
            self._require_sparse_as_dense(form)

    def _require_complex_as_real(self, form: dict[str, Any]) -> None:
        """Fail unless complex weights move as two real numbers, or are refused unmoved."""
        whole = nn.Parameter(torch.tensor([1 + 2j, -0.5 + 1j], dtype=torch.complex128))
        pairs = nn.Parameter(torch.view_as_real(whole.detach()).clone())
        try:
            for weight in (whole, pairs):
                optimizer = self.make([weight], **form)
                for index in range(3):
                    give_gradients([pairs], index)
                    gradient = pairs.grad
                    if weight is whole and gradient is not None:
                        weight.grad = torch.view_as_complex(gradient)
                    optimizer.step()
        except (ValueError, TypeError, RuntimeError):
            kept = bool((whole == torch.tensor([1 + 2j, -0.5 + 1j])).all())
            require(kept, f"with {form} a complex parameter moved before it was refused")
            return
        got = {"complex": torch.view_as_real(whole.detach())}
        wanted = {"complex": pairs.detach()}
        require_same(got, wanted, f"with {form}, complex as two real numbers", scale=1e-12)

    def _require_sparse_as_dense(self, form: dict[str, Any]) -> None:
        """Fail unless sparse gradients train as dense ones, or are refused unmoved."""
        try:
            got = self._steps_with_table(form, sparse=True)
        except Unmoved:
            return
        wanted = self._steps_with_table(form, sparse=False)
        require_same(got, wanted, f"with {form}, a sparse gradient as the dense one", scale=1e-12)

    def _steps_with_table(self, form: dict[str, Any], *, sparse: bool) -> dict[str, Tensor]:
        """Return a weight and a table of which one row has gradients, after three steps.

        Raises:
            Unmoved: If a sparse gradient is refused, and the other weight is where it was.
        """
        other = nn.Parameter(torch.ones(2, dtype=torch.float64))
        table = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        optimizer = self.make([other, table], **form)
        for _ in range(3):
            gradient = torch.zeros(4, 2, dtype=torch.float64)
            gradient[1] = 0.5
            other.grad = torch.ones_like(other)
            table.grad = gradient.to_sparse(1) if sparse else gradient
            try:
                optimizer.step()
            except (ValueError, TypeError, RuntimeError) as refusal:
                unmoved = sparse and bool((other == 1).all())
                require(
                    unmoved,
                    f"with {form} a weight moved before the sparse gradient of another was refused",
                )
                raise Unmoved from refusal
        return named([other, table])
