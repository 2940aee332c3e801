"""Adaptive gradient clipping as a correction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control
from regrad.hookspecs import Step
from torch import Tensor
from torch.optim import Optimizer

from regrad_clipping.correction import CLIPPING
from regrad_clipping.functional import Unit, check_positive, clip_units_
from regrad_clipping.units import Holding, check_head, head_modules, holdings

AXIS_FORM = "axis must be 'auto' or a list of 'pattern=dimension' or 'pattern=none', got {!r}"


class AGC(Correction):
    r"""Shrink each output's gradient that is large against its weights.

    For unit :math:`i` (the fan-in of one output) of a gradient G and its weight W

    .. math:: G_i \leftarrow G_i \min(1, \lambda \max(\|W_i\|, \epsilon) / \|G_i\|).

    What a unit is follows from the module's type; vectors, scalars and gains are one
    unit each. The weight of the classifier head, with an embedding tied to it, is
    left alone; its bias is not.

    Args:
        max_ratio: :math:`\lambda`, the largest gradient norm per weight norm. Positive.
        weight_floor: :math:`\epsilon`, the smallest weight norm used, in the units of
            the weight. Positive: without it a tensor that starts at zero never moves.
        head: Name of the classifier head; "auto" finds the module that makes the
            model's output in the first training forward, else the last linear layer
            called; None leaves nothing alone.
        axis: "auto", or exceptions "pattern=dimension" and "pattern=none" (the whole
            tensor is one unit) by parameter name, with the wildcards of a shell; the
            first that fits decides.

    Raises:
        ValueError: If a number is not positive, `axis` cannot be read or fits no
            parameter, or `head` names no module with a weight.
        RegradError: If the head is to be found and no forward pass shows it, or ranks
            hold different parts of the model.

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
        """How far a gradient may go, and where the rule needs help."""

        max_ratio: float = 0.01
        weight_floor: float = 1e-3
        head: str | float | None = (
            "auto"  # "agc:head=2" is read as a number, and layers may be called so
        )
        axis: Literal["auto"] | tuple[str, ...] = "auto"

        def __post_init__(self) -> None:
            check_positive("max_ratio", self.max_ratio)
            check_positive("weight_floor", self.weight_floor)
            for item in () if self.axis == "auto" else self.axis:
                if not re.fullmatch(r"[^=]+=(?:\d+|none)", item):
                    raise ValueError(AXIS_FORM.format(item))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.head != "auto":
            self.needs = with_changes(self.needs, record=False, reads=("units",))
        self._held: list[Holding] = []
        self._units: dict[str, Unit] = {}
        self._spared: frozenset[str] | None = None
        self._factors: list[Tensor] = []

    def setup(self, attachment: Attachment) -> None:
        """Read the units from the modules' types; refuse a head that cannot be found."""
        self._read_units()
        for item in () if self.options.axis == "auto" else self.options.axis:
            pattern = item.rpartition("=")[0]
            if not any(fnmatchcase(name, pattern) for name in self._units):
                raise ValueError(
                    f"axis must name parameters of the model, got {pattern!r}, which fits none"
                )
        if self.options.head is None:
            self._spared = frozenset()
        elif self.options.head != "auto":
            check_head(str(self.options.head), self._held)
            self._spare([str(self.options.head)])
        elif attachment.record is None:
            raise RegradError(
                "'agc' cannot see a compiled model's head; pass head='name', or attach before compiling"
            )

    def _read_units(self) -> None:
        """Note each parameter's unit by name: parameters themselves change under FSDP2."""
        self._held = holdings(self.attachment.model)
        for h in reversed(self._held):  # the first module that holds a tied parameter decides
            self._units[h.known_as] = self._exception(h) or h.unit

    def _exception(self, holding: Holding) -> Unit | None:
        """Return what option `axis` says of one parameter."""
        for item in () if self.options.axis == "auto" else self.options.axis:
            pattern, _, axis = item.rpartition("=")
            if fnmatchcase(holding.known_as, pattern):
                if axis != "none" and int(axis) >= holding.rank:
                    raise ValueError(
                        f"axis must be below {holding.rank} for {holding.known_as!r}, got {axis}"
                    )
                return Unit(None if axis == "none" else int(axis))
        return None

    def _spare(self, modules: Sequence[str]) -> None:
        """Leave the weights of these modules alone, with what is tied to them."""
        self._spared = frozenset(
            h.known_as for h in self._held if h.module in modules and h.is_weight
        )
        note = f"'agc' leaves the classifier head alone: {', '.join(sorted(self._spared))}"
        self.attachment.reasons = (*self.attachment.reasons, note)

    def _find_head(self) -> frozenset[str]:
        """Return the names to leave alone, found in the record when they are asked for first."""
        if self._spared is None:
            found = head_modules(self.attachment.model, self.attachment.record.calls, self._held)
            if not found:
                raise RegradError(
                    "'agc' saw no classifier head in a training forward (there is none, the model was not called, or "
                    "compiled code ran without hooks); pass head='name', or head=None to leave nothing alone"
                )
            self._spare(found)
        return self._spared or frozenset()

    def correct_gradients(self, step: Step) -> None:
        """Clip the gradients of the step."""
        spared = self._find_head()
        if not self._units.keys() >= {*step.names}:
            self._read_units()
        chosen = [
            (gradient, parameter, self._units.get(name, Unit(0 if parameter.dim() > 1 else None)))
            for name, parameter, gradient in zip(
                step.names, step.parameters, step.gradients, strict=True
            )
            if gradient is not None and name not in spared
        ]
        if chosen:
            grads, weights, units = zip(*chosen, strict=True)
            bounds = {
                "max_ratio": self.options.max_ratio,
                "weight_floor": self.options.weight_floor,
            }
            self._factors = clip_units_(grads, weights, units, **bounds)

    def metrics(self) -> dict[str, float]:
        """Return the share of units clipped in the last step, of those that this process holds."""
        held = [f.flatten().cpu() for f in self._factors if f.numel()]
        return {"share_clipped": (torch.cat(held) < 1).double().mean().item()} if held else {}

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter may be clipped: all but the head's weight, once the head is known."""
        return name not in (self._spared or ())

    def control(self, optimizer: Optimizer) -> Control:
        """Return clipping by the global norm, which knows nothing of weights or units."""
        return Control(name="clip-norm", corrections=("clip-norm",))

    def idle_reason(self) -> str:
        """Say why no gradient may have been clipped."""
        return f"threshold never reached: no unit's gradient exceeded {self.options.max_ratio} of its weights"
