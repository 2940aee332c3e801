"""What a correction is: frozen options, declared needs, hooks."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from regrad.errors import RegradError
from regrad.reading import EVERYTHING, Implied, Reading, layouts_with
from regrad.signatures import ClassSignature
from regrad.specs import write_spec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

API_VERSION = 1

Stage = Literal["hidden", "criterion", "weights", "gradient", "moment", "update"]
HOOK_OF_STAGE: dict[Stage, str] = {
    "hidden": "setup",
    "criterion": "wrap_criterion",
    "weights": "predict_weights",
    "gradient": "correct_gradients",
    "moment": "correct_moments",
    "update": "correct_update",
}
"""The hook of each stage, in time order. The hook `after_step` has no stage."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a correction declares about itself.

    Attributes:
        stages: When it acts; each stage's hook must be implemented, and no other.
        exclusive: Resources that one correction at most may own. The stages
            "weights" (the window) and "criterion" are such resources without saying so.
        layouts: Where it is exact, by names of layouts: "plain" (one process, or each its
            own copy), "ddp", "fsdp2", "flat" (FSDP1), "zero-redundancy" (torch's
            ZeroRedundancyOptimizer). Attaching elsewhere is refused. Leave it out and say
            `reads`: then these are the core's layouts that offer all that is read, and a
            layout of somebody else's engine serves too if it offers that.
        closures: Whether it bears an optimizer that evaluates its closure several
            times per step.
        sparse: Whether it has a rule for sparse gradients.
        before: Names of corrections that this one acts before, in a stage they share.
        after: Names of corrections that this one acts after, in a stage they share.
        conflicts: Why it refuses to work with a correction or on a layout, keyed by their name.
        warmup_steps: Optimizer steps in which it changes nothing by design.
        record: Whether it reads the record of the first training forward, which is
            one of the whole model.
        reads: What its rule reads beyond what it changes: single "elements", "units"
            (one output's weights), a whole "tensor", the whole "model" (its norm, its
            head), the optimizer's "moments", the "micro"-batches of a step, the
            "criterion". Where ranks hold different parameters (pipeline stages,
            experts), corrections that read the "model" or its record are refused;
            `conflicts` may say under "parts" what to do there. A layout that does not offer
            all of this is refused at attach, see `regrad.hookspecs.Layout`.

    Example:
        >>> Needs(stages=("gradient",), reads=("units",)).layouts
        ('plain', 'ddp', 'fsdp2', 'zero-redundancy')
    """

    stages: tuple[Stage, ...]
    exclusive: tuple[str, ...] = ()
    layouts: tuple[str, ...] = Implied()
    closures: bool = False
    sparse: bool = False
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    warmup_steps: int = 0
    record: bool = False
    reads: tuple[Reading, ...] = ()

    def __post_init__(self) -> None:
        """Let the layouts follow from what is read, also in a copy that reads something else."""
        if isinstance(self.layouts, Implied):
            object.__setattr__(self, "layouts", layouts_with(self.reads))


@dataclass(frozen=True, kw_only=True)
class Control:
    """The trivial change that a correction must beat before it may be called better.

    Attributes:
        name: Short name of the change, such as "nesterov".
        optimizer: Keyword arguments of the optimizer to set.
        optimizer_class: Class to train with instead. Options that it shares with the optimizer
            keep their values, group by group, unless `optimizer` sets them; the others are
            its defaults. None keeps the optimizer.
        head_init: Factor on the initial weights and bias of the output layer.
        head_lr: Factor on the learning rate of the output layer.
        body_lr: Factor on the learning rate of every other layer.
        corrections: Corrections (as strings for `regrad.create`) to attach instead.
    """

    name: str
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    optimizer_class: type[Optimizer] | None = None
    head_init: float = 1.0
    head_lr: float = 1.0
    body_lr: float = 1.0
    corrections: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a correction without any.

    Other corrections nest a frozen dataclass of their own and check its values there.
    """


def _fits(value: object, annotation: Any) -> bool:
    """Say whether a value fits a class, a union, a Literal or a homogeneous tuple."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, annotation)


def _spoken(annotation: Any) -> str:
    """Return a type as it is written in source."""
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).removeprefix("typing.")


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return '; did you mean ...?' if a known name is close, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Correction:
    """An object that changes gradients: subclass it, declare `needs`, implement hooks.

    A subclass sets `name` and `needs`, may nest a frozen dataclass `Options` (its
    fields become keyword arguments), and implements the hooks of
    `regrad.hookspecs.CorrectionSpec` that belong to its stages. Numbers that
    change over training are state: keep them apart from the options, by parameter
    name, and return them from `state_dict`.

    Args:
        **options: The fields of the class's `Options`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If an option is out of its range.

    Example:
        >>> from dataclasses import dataclass
        >>> from regrad import Correction
        >>> from regrad.correction import Needs
        >>> class Scale(Correction):
        ...     "Multiply every gradient by a factor."
        ...     name = "scale"
        ...     needs = Needs(stages=("gradient",), reads=("elements",))
        ...     @dataclass(frozen=True, kw_only=True)
        ...     class Options:
        ...         factor: float = 0.5
        ...     def correct_gradients(self, step):
        ...         for gradient in step.gradients:
        ...             if gradient is not None:
        ...                 gradient.mul_(self.options.factor)
        >>> Scale(factor=0.1)
        Scale(factor=0.1)
        >>> Scale(factor=0.1).as_text()
        'scale:factor=0.1'
    """

    name: ClassVar[str]
    needs: Needs
    api_version: ClassVar[int] = API_VERSION
    Options: ClassVar[type[Any]] = Options
    __signature__: ClassVar[Any] = ClassSignature()

    def __init__(self, **options: Any) -> None:
        allowed = typing.get_type_hints(self.Options)
        for name, value in options.items():
            if name not in allowed:
                names = ", ".join(allowed) or "none"
                near = did_you_mean(name, allowed)
                raise TypeError(f"{self.name} has no option {name!r}; allowed: {names}{near}")
            if not _fits(value, allowed[name]):
                raise TypeError(f"{name} must be {_spoken(allowed[name])}, got {value!r}")
        self.options = self.Options(**options)
        self.attachment: Any = None

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self.options).items())
        return f"{type(self).__name__}({options})"

    def as_text(self) -> str:
        """Return this correction as `regrad.create` reads it, without options at their defaults.

        Raises:
            TypeError: If an option is of a type that cannot be written, such as a list in a list.
            ValueError: If an option is a text with both kinds of quotes.
        """
        options: dict[str, Any] = {}
        for option in dataclasses.fields(self.Options):
            value = getattr(self.options, option.name)
            if option.init and value != option.default:
                options[option.name] = value
        return write_spec(self.name, options)

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return the trivial change that this correction must beat on `optimizer`, or None."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return numbers worth plotting, by name.

        Called rarely, so it may wait for the device.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and plain values, by parameter name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise RegradError(f"correction {self.name!r} has no state, got {', '.join(state)}")

    def idle_reason(self) -> str | None:
        """Say why nothing may have changed; None says that changing nothing is normal."""
        return "it changed no tensor"

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether this correction acts on a parameter; the receipt lists those it acts on."""
        return True

    @classmethod
    def check_class(cls) -> None:
        """Raise `RegradError` unless the declared stages and the implemented hooks agree."""
        has_name = isinstance(getattr(cls, "name", None), str)
        if not has_name or not isinstance(getattr(cls, "needs", None), Needs):
            raise RegradError(f"{cls.__name__} must declare name (a string) and needs (a Needs)")
        if not cls.needs.stages:
            raise RegradError(
                f"correction {cls.name!r} implements no stage; stages: {', '.join(HOOK_OF_STAGE)}"
            )
        _check_reads(cls)
        _check_hooks(cls)


def _check_reads(cls: type[Correction]) -> None:
    """Raise `RegradError` if a class declares to read what there is not."""
    for reading in cls.needs.reads:
        if reading not in EVERYTHING:
            allowed = ", ".join(map(repr, typing.get_args(Reading)))
            raise RegradError(
                f"correction {cls.name!r} must declare reads of {allowed}, got {reading!r}"
            )


def _check_hooks(cls: type[Correction]) -> None:
    """Raise `RegradError` unless each stage of a class has its hook and each hook its stage."""
    for stage, hook in HOOK_OF_STAGE.items():
        is_declared = stage in cls.needs.stages
        is_implemented = hasattr(cls, hook)
        if is_declared and not is_implemented:
            public = [name for name in dir(cls) if not name.startswith("_")]
            raise RegradError(
                f"correction {cls.name!r} declares stage {stage!r} but has no method "
                f"{hook!r}{did_you_mean(hook, public)}"
            )
        # `setup`, the hook of "hidden", may do other things than hook submodules.
        if is_implemented and not is_declared and stage != "hidden":
            raise RegradError(
                f"correction {cls.name!r} implements {hook!r} but does not declare stage {stage!r}"
            )
