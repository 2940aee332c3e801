"""Adaptive gradient clipping as a correction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control
from regrad.hookspecs import Step
from regrad.signatures import takes
from torch import Tensor
from torch.optim import Optimizer

from regrad_clipping.correction import CLIPPING
from regrad_clipping.functional import Unit, check_positive, clip_units_
from regrad_clipping.units import Holding, check_head, has_forward, head_modules, holdings


class AxisRule(NamedTuple):
    """One exception in option `axis`.

    Attributes:
        pattern: Which parameters, by name, with the wildcards of a shell.
        axis: Dimension that counts their units; None makes the whole tensor one unit.
    """

    pattern: str
    axis: int | None


def axis_rules(axis: Literal["auto"] | Sequence[str]) -> list[AxisRule]:
    """Read option `axis`.

    Args:
        axis: "auto", or items "pattern=dimension" and "pattern=none".

    Raises:
        ValueError: If an item has another form.

    Example:
        >>> axis_rules(["decoder.*.weight=1", "scale=none"])
        [AxisRule(pattern='decoder.*.weight', axis=1), AxisRule(pattern='scale', axis=None)]
    """
    if axis == "auto":
        return []
    rules = []
    for item in axis:
        found = re.fullmatch(r"([^=]+)=(\d+|none)", item)
        if found is None:
            raise ValueError(
                "axis must be 'auto' or a list of 'pattern=dimension' or 'pattern=none', "
                f"got {item!r}"
            )
        pattern, dimension = found.groups()
        rules.append(AxisRule(pattern, None if dimension == "none" else int(dimension)))
    return rules


class AGC(Correction):
    r"""Shrink each output's gradient that is large against its weights.

    For unit :math:`i` (the fan-in of one output) of a gradient G and its weight W

    .. math:: G_i \leftarrow G_i \min(1, \lambda \max(\|W_i\|, \epsilon) / \|G_i\|).

    What a unit is follows from the module's type; vectors, scalars and gains are one
    unit each. The weight of the classifier head is left alone, with an embedding tied
    to it; its bias is not.

    Args:
        max_ratio: :math:`\lambda`, the largest gradient norm per weight norm. Positive.
        weight_floor: :math:`\epsilon`, the smallest weight norm used, in the units of
            the weight. Positive: without it a tensor that starts at zero never moves.
        head: Name of the classifier head; "auto" finds the module that makes the
            model's output in the first training forward, else the last linear layer
            called; None clips every layer. If several modules are attached together, the one called
            last makes the output.
        axis: "auto", or a list of exceptions "pattern=dimension" and "pattern=none"
            (the whole tensor is one unit). A pattern is the name of a parameter, with
            the wildcards of a shell; the first match decides.

    Raises:
        ValueError: If a number is not positive, `axis` cannot be read or matches no parameter, or
            `head` names no module with a weight.
        RegradError: If `head` is "auto" and no forward pass shows one, the model has no
            forward of its own, or ranks hold different parts of the model.

    Example:
        >>> AGC(max_ratio=0.02, axis=("decoder.*.weight=1",))
        AGC(max_ratio=0.02, weight_floor=0.001, head='auto', axis=('decoder.*.weight=1',))

    References:
        Brock, De, Smith and Simonyan, 2021, "High-Performance Large-Scale Image
        Recognition Without Normalization", section 4. The paper leaves out the last
        linear layer; we find it by what it makes, not by its place in a list.
    """

    name = "agc"
    needs = with_changes(
        CLIPPING,
        record=True,
        reads=("units", "model"),
        conflicts={"parts": "pass head=None, which clips the classifier head too"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How large a gradient may be, and where the rule needs help."""

        max_ratio: float = 0.01
        weight_floor: float = 1e-3
        # A number too: layers may be called 2, and "agc:head=2" is read as one.
        head: str | float | None = "auto"
        axis: Literal["auto"] | tuple[str, ...] = "auto"

        def __post_init__(self) -> None:
            check_positive("max_ratio", self.max_ratio)
            check_positive("weight_floor", self.weight_floor)
            axis_rules(self.axis)

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.head != "auto":
            self.needs = with_changes(self.needs, record=False, reads=("units",))
        self._rules = axis_rules(self.options.axis)
        self._held: list[Holding] = []
        self._units: dict[str, Unit] = {}
        self._spared: frozenset[str] | None = None
        self._factors: list[Tensor] = []

    def setup(self, attachment: Attachment) -> None:
        """Read the units from the modules' types; refuse a head that cannot be found."""
        self._read_units()
        for rule in self._rules:
            if not any(fnmatchcase(name, rule.pattern) for name in self._units):
                raise ValueError(
                    f"axis must name parameters of the model, got {rule.pattern!r}, which matches "
                    "none"
                )
        head = self.options.head
        if head is None:
            self._spared = frozenset()
        elif head != "auto":
            check_head(str(head), self._held)
            self._spare([str(head)])
        elif attachment.record is None:
            raise RegradError(
                "'agc' cannot see a compiled model's head; "
                "pass head='name', or attach before compiling"
            )
        elif not any(has_forward(root) for root in attachment.engine.roots):
            raise RegradError(
                f"'agc' finds the head in the model's forward, and "
                f"{type(attachment.model).__name__} has none; attach the modules that are called "
                "as a list, or pass head='name', or head=None to clip every layer"
            )

    def _read_units(self) -> None:
        """Note each parameter's unit by name: FSDP2 replaces the parameters themselves."""
        self._held = holdings(self.attachment.model)
        for held in reversed(self._held):  # the first module that holds a tied parameter decides
            self._units[held.known_as] = self._unit_of(held)

    def _unit_of(self, held: Holding) -> Unit:
        """Return the unit that option `axis` gives a parameter, else that of its module's type."""
        for rule in self._rules:
            if not fnmatchcase(held.known_as, rule.pattern):
                continue
            if rule.axis is not None and rule.axis >= held.rank:
                raise ValueError(
                    f"axis must be below {held.rank} for {held.known_as!r}, got {rule.axis}"
                )
            return Unit(rule.axis)
        return held.unit

    def _spare(self, modules: Sequence[str]) -> frozenset[str]:
        """Exclude the weights of these modules, and what is tied to them; return the names."""
        self._spared = frozenset(
            held.known_as for held in self._held if held.module in modules and held.is_weight
        )
        note = f"'agc' leaves the classifier head alone: {', '.join(sorted(self._spared))}"
        self.attachment.reasons = (*self.attachment.reasons, note)
        return self._spared

    def _find_head(self) -> frozenset[str]:
        """Return the names to leave alone; the first time they are read from the record."""
        if self._spared is not None:
            return self._spared
        found = head_modules(self.attachment.model, self.attachment.record.calls, self._held)
        if not found:
            raise RegradError(
                "'agc' saw no classifier head in a training forward (there is none, the model was "
                "not called, or compiled code ran without hooks); pass head='name', or head=None "
                "to clip every layer"
            )
        return self._spare(found)

    def correct_gradients(self, step: Step) -> None:
        """Clip the gradients of the step."""
        spared = self._find_head()
        if not self._units.keys() >= {*step.names}:
            self._read_units()
        grads: list[Tensor] = []
        weights: list[Tensor] = []
        units: list[Unit] = []
        for name, parameter in step.named_parameters():
            if parameter.grad is None or name in spared:
                continue
            grads.append(parameter.grad)
            weights.append(parameter)
            units.append(self._units.get(name) or Unit(0 if parameter.dim() > 1 else None))
        if grads:
            self._factors = clip_units_(
                grads,
                weights,
                units,
                max_ratio=self.options.max_ratio,
                weight_floor=self.options.weight_floor,
            )

    def metrics(self) -> dict[str, float]:
        """Return the share of units clipped in the last step, of those that this process holds."""
        held = [factor.flatten().cpu() for factor in self._factors if factor.numel()]
        if not held:
            return {}
        return {"share_clipped": (torch.cat(held) < 1).double().mean().item()}

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter may be clipped: all but the head's weight, once it is known."""
        return self._spared is None or name not in self._spared

    def control(self, optimizer: Optimizer) -> Control:
        """Return clipping by the global norm, which looks at neither weights nor units."""
        return Control(name="clip-norm", corrections=("clip-norm",))

    def idle_reason(self) -> str:
        """Say why no gradient may have been clipped."""
        return (
            "threshold never reached: "
            f"no unit's gradient exceeded {self.options.max_ratio} of its weights"
        )
