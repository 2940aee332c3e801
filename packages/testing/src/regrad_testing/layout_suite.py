"""A suite for layouts: whatever one offers is read rightly there, and nothing else is read."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from regrad import Correction, RegradError
from regrad.correction import Needs
from regrad.hookspecs import Step
from regrad.layouts import choose
from regrad.sharding import local, row_norms, total_norm
from torch import Tensor, nn

from regrad_testing.clauses import difference, require
from regrad_testing.loops import Training, whole
from regrad_testing.problem import Problem
from regrad_testing.processes import launch
from regrad_testing.settings import MORE
from regrad_testing.worker import WORLD

momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class _ByElements(Correction):
    """Clamp every element."""

    name = "reads-elements"
    needs = Needs(stages=("gradient",), reads=("elements",))

    def correct_gradients(self, step: Step) -> None:
        for gradient in _present(step):
            local(gradient).clamp_(-0.01, 0.01)


class _ByUnits(Correction):
    """Shrink every row by its norm."""

    name = "reads-units"
    needs = Needs(stages=("gradient",), reads=("units",))

    def correct_gradients(self, step: Step) -> None:
        for gradient in _present(step):
            local(gradient).div_(1 + row_norms(gradient))


class _ByTensors(Correction):
    """Shrink every tensor by its norm."""

    name = "reads-tensors"
    needs = Needs(stages=("gradient",), reads=("tensor",))

    def correct_gradients(self, step: Step) -> None:
        for gradient in _present(step):
            norm = row_norms(gradient, axis=None).reshape(())
            local(gradient).div_(1 + norm)


class _ByModel(Correction):
    """Shrink all gradients by the norm of the whole model's."""

    name = "reads-model"
    needs = Needs(stages=("gradient",), reads=("model",))

    def correct_gradients(self, step: Step) -> None:
        gradients = _present(step)
        square = total_norm(gradients).square()
        if step.layout is not None:
            square = step.layout.sum_over_model(square)
        for gradient in gradients:
            local(gradient).div_(1 + square.sqrt())


class _ByMoments(Correction):
    """Add a little of the momentum to itself."""

    name = "reads-moments"
    needs = Needs(stages=("moment",), reads=("elements", "moments"))

    def correct_moments(self, step: Step) -> None:
        for parameter in step.parameters:
            moment = step.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if moment is not None:
                local(moment).mul_(1.01)


class _ByCriterion(Correction):
    """Sharpen the logits that the loss sees."""

    name = "reads-criterion"
    needs = Needs(stages=("criterion",), reads=("criterion",))

    def wrap_criterion(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, *rest, **options: criterion(2 * logits, *rest, **options)


class _ByWindow(Correction):
    """Take gradients at weights that are moved."""

    name = "moves-weights"
    needs = Needs(stages=("weights",), reads=("elements",))

    def predict_weights(self, step: Step) -> list[Tensor | None]:
        return [0.1 * local(parameter.detach()) for parameter in step.parameters]


class _ByUpdate(Correction):
    """Shorten the optimizer's steps by their norm, and take those against the gradient out."""

    name = "changes-update"
    needs = Needs(stages=("update",), reads=("tensor",))

    def correct_update(self, step: Step) -> None:
        for displacement, gradient in zip(step.displacements, step.gradients, strict=True):
            if displacement is None or gradient is None:
                continue
            norm = row_norms(displacement, axis=None).reshape(())
            part = local(displacement)
            part.mul_(part * local(gradient) < 0).div_(1 + norm)


def _present(step: Step) -> list[Tensor]:
    """Return the gradients that are there."""
    return [gradient for gradient in step.gradients if gradient is not None]


PROBES: tuple[type[Correction], ...] = (
    _ByElements,
    _ByUnits,
    _ByTensors,
    _ByModel,
    _ByMoments,
    _ByCriterion,
    _ByWindow,
    _ByUpdate,
)


class LayoutSuite(ABC):
    """What a layout owes, on two gloo processes in float64; subclass it at the top of a file.

    Simple corrections, each of which reads one kind of thing, train under the layout as on one
    process where it offers that, and are refused with its name where it does not. The file is
    imported in the processes, so that the distribution that offers the layout must be found there.

    Attributes:
        layout: Its name.
        problem: What is trained.

    Example:
        >>> class TestMine(LayoutSuite):
        ...     layout = "plain"
        ...     @staticmethod
        ...     def wrap(model):
        ...         return model
    """

    layout: ClassVar[str]
    problem: ClassVar[Problem] = Problem()
    _kept: ClassVar[list[dict[str, Any]]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._kept = []

    @staticmethod
    @abstractmethod
    def wrap(model: nn.Module) -> nn.Module:
        """Return what the loop calls; its optimizer gets the parameters that `model` has then."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs with its rank."""
        trained = {probe.name: functools.partial(cls.train_apart, probe) for probe in PROBES}
        return {**trained, "saved": cls.save_while_moved}

    @classmethod
    def train_apart(cls, probe: type[Correction], rank: int) -> dict[str, Any]:
        """Train on this rank's rows of every batch; compare with one process that sees all rows."""
        try:
            training = cls._training([probe()], rank)
        except RegradError as refusal:
            return {"refused": str(refusal), "is_offered": cls._offers(probe)}
        for index in range(cls.problem.steps):
            training.run([index])
            training.evaluate(index)
        alone = Training(cls.problem, momentum, [probe()]).run()
        far, where = difference(alone.weights(), training.weights())
        return {"far": far, "where": where, "is_offered": cls._offers(probe)}

    @classmethod
    def save_while_moved(cls, rank: int) -> dict[str, Any]:
        """Compare a state dict that is taken while weights are moved with one from before."""
        training = cls._training([_ByWindow()], rank)
        before = _copies(training.outer)
        training.backward(0)
        far, where = difference(before, _copies(training.outer))
        return {"far": far, "where": where, "layout": training.attachment.engine.layout.name}

    @classmethod
    def _training(cls, corrections: Sequence[Correction], rank: int) -> Training:
        """Return a training on this rank's rows of every batch, before its first step."""
        size = cls.problem.batch_size // WORLD
        rows = slice(rank * size, (rank + 1) * size)
        return Training(cls.problem, momentum, corrections, parallel=cls.wrap, rows=rows)

    @classmethod
    def _offers(cls, probe: type[Correction]) -> bool:
        """Say whether the layout that attach chooses offers what a correction reads."""
        model = cls.problem.make_model()
        outer = cls.wrap(model)
        layout = choose(outer, momentum(model.parameters()))
        steps_its_own = layout.own_step is not None and "update" in probe.needs.stages
        return layout.offers.issuperset(probe.needs.reads) and not steps_its_own

    @classmethod
    def _on_two_processes(cls) -> list[dict[str, Any]]:
        """Return what each case gave on each process, launched once for the class."""
        if not cls._kept:
            cls._kept = launch(cls)
        return cls._kept

    def _results(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what every process saw, with a few words on which it was."""
        found: list[tuple[str, dict[str, Any]]] = []
        for rank, seen in enumerate(self._on_two_processes()):
            for case, result in seen.items():
                require("error" not in result, f"{case}, rank {rank}: {result.get('error')}")
                found.append((f"{case}, rank {rank}", result))
        return found

    def test_it_is_chosen_at_attach(self) -> None:
        """The layout of what `wrap` returns is the one that is tested."""
        __tracebackhide__ = True
        for where, result in self._results():
            name = result.get("layout", self.layout)
            require(name == self.layout, f"{where}: layout {name!r} is chosen")

    def test_what_it_offers_trains_as_one_process(self) -> None:
        """Two processes end within 1e-12 of one; a state dict in between holds the true weights."""
        __tracebackhide__ = True
        for where, result in self._results():
            if not result.get("is_offered", True):
                continue
            require("refused" not in result, f"{where}: offered, but {result.get('refused')}")
            near = f"{where}: {result['where']!r} ends {result['far']:.1e} from one process"
            require(result["far"] <= MORE, f"{near}, more than {MORE:.0e}")

    def test_what_it_does_not_offer_is_refused_with_its_name(self) -> None:
        """Attach raises, and the message names the layout."""
        __tracebackhide__ = True
        for where, result in self._results():
            if result.get("is_offered", True):
                continue
            told = result.get("refused", "nothing")
            named = f"not exact on layout {self.layout!r}" in told
            require(named, f"{where}: not offered, and attach says {told}")


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what `model.state_dict()` holds, whole where they are shards."""
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
