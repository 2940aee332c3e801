"""AdaNorm: gradients enter the first moment with at least their usual norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any, Literal, NamedTuple

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Needs
from regrad.hookspecs import Step
from regrad.optimizers import FIRST_MOMENTS, first_moment_key
from regrad.sharding import is_sharded
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_adanorm.functional import add_scaled_, average_and_excess, norms_of


class Member(NamedTuple):
    """A parameter that has a gradient."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor


class AdaNorm(Correction):
    r"""Keep short gradients at their usual norm in the first moment.

    Per tensor, with :math:`e_0 = 0`,

    .. math:: e \leftarrow \gamma e + (1-\gamma)|g|, \qquad
        s = g\,e/|g| \text{ if } e > |g| \text{ else } g.

    The first moment takes s where it took g; the second moment sees g. With
    coupled decay :math:`g + \lambda\theta` takes the place of g in the rule, as in the optimizer
    itself. `.grad` is left alone: what the moment will lack is added to the moment just before the
    step, which is exact on torch's Adam, AdamW, NAdam, RAdam, Adamax and SGD with momentum. Where
    they use the gradient elsewhere, in NAdam's and Nesterov's steps, it stays g.

    Args:
        decay: :math:`\gamma` in [0, 1), per optimizer step. At 0 nothing changes.
        target: "moment", the paper's rule; "gradient" rescales `.grad` itself, on any
            optimizer, which the paper found to be worse, and ignores weight decay.

    Raises:
        ValueError: If `decay` is not in [0, 1).
        RegradError: At attach, if the first moment is not known or is off
            (:math:`\beta_1` or the momentum is 0), or parameters are complex.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> attachment = regrad.attach(model, optimizer, [AdaNorm(decay=0.95)])

    References:
        Dubey, Singh and Chaudhuri, 2023, "AdaNorm: Adaptive Gradient Norm Correction
        based Optimizer for CNNs" (arXiv 2210.06364), AdamNorm. We differ if a gradient is zero or
        not finite, and support any of six optimizers.
    """

    name = "adanorm"
    needs = Needs(
        stages=("gradient", "moment"),
        reads=("tensor", "moments"),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How long norms are remembered, and what is rescaled."""

        decay: float = 0.95
        target: Literal["moment", "gradient"] = "moment"

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = with_changes(self.needs, stages=(self.options.target,))
        if self.options.target == "gradient":
            self.needs = with_changes(self.needs, reads=("tensor",))
        self._averages: dict[str, Tensor] = {}
        self._largest: list[Tensor] = []
        self._scratch: dict[torch.dtype, Tensor] = {}

    def setup(self, attachment: Attachment) -> None:
        """Refuse an optimizer whose first moment is unknown or off, and complex parameters."""
        optimizer = attachment.optimizer
        for group in optimizer.param_groups:
            if any(parameter.is_complex() for parameter in group["params"]):
                raise RegradError(
                    "'adanorm' has no rule for complex parameters; "
                    "train them with a separate optimizer"
                )
        if self.options.target == "gradient":
            return
        if first_moment_key(optimizer) is None:
            known = ", ".join(kind.__name__ for kind in FIRST_MOMENTS)
            raise RegradError(
                f"'adanorm' must know where {type(optimizer).__name__} keeps its first moment, "
                f"as it does for torch's own {known}; use one of them, or target='gradient'"
            )
        for group in optimizer.param_groups:
            _share_of_new(group)

    def correct_gradients(self, step: Step) -> None:
        """Rescale `.grad`, if that is the target."""
        if self.options.target != "gradient":
            return
        self._largest = []
        for members in _alike(step, step.parameters):
            gradients = [member.gradient for member in members]
            excess = self._advance(members, norms_of(gradients))
            add_scaled_(gradients, gradients, excess)

    def correct_moments(self, step: Step) -> None:
        """Add to the first moments what they will lack, if they are the target."""
        if self.options.target != "moment":
            return
        self._largest = []
        for group in step.optimizer.param_groups:
            for members in _alike(step, group["params"]):
                self._correct_moments_of(members, step.optimizer, group)

    def _correct_moments_of(
        self, members: Sequence[Member], optimizer: Optimizer, group: Mapping[str, Any]
    ) -> None:
        """Correct the first moments of parameters of one group, device and dtype."""
        sign = -1.0 if group["maximize"] else 1.0
        decay = 0.0 if group.get("decoupled_weight_decay") else sign * group["weight_decay"]
        excess = self._advance(members, self._norms(members, decay))
        largest = _largest_finite(members)
        factors = (excess * (sign * _share_of_new(group))).clamp(-largest, largest)
        key = FIRST_MOMENTS[type(optimizer)]
        moments = [optimizer.state.get(member.parameter, {}).get(key) for member in members]
        # Before the first step there is no moment and e_0 = 0, so nothing is due. After e was
        # restored and the optimizer's state was not, the correction waits for a moment.
        ready = [index for index, moment in enumerate(moments) if moment is not None]
        if len(ready) < len(members):
            if not ready:
                return
            moments = [moments[index] for index in ready]
            members = [members[index] for index in ready]
            factors = torch.stack([factors[index] for index in ready])
        self._add(moments, members, decay, factors)

    def _norms(self, members: Sequence[Member], decay: float) -> Tensor:
        """Return the norms of g + decay·θ, shape [n]."""
        if not decay:
            return norms_of([member.gradient for member in members])
        return torch.cat([norms_of([self._decayed(member, decay)]) for member in members])

    def _add(
        self, moments: Sequence[Tensor], members: Sequence[Member], decay: float, factors: Tensor
    ) -> None:
        """Add factor·(g + decay·θ) to each moment."""
        if not decay:
            add_scaled_(moments, [member.gradient for member in members], factors)
            return
        on_cpu = factors.device.type == "cpu"
        for moment, member, factor in zip(moments, members, factors.unbind(), strict=True):
            if on_cpu and factor.item() == 0:
                continue
            add_scaled_([moment], [self._decayed(member, decay)], factor.reshape(1))

    def _decayed(self, member: Member, decay: float) -> Tensor:
        """Return g + decay·θ; on a CPU in a buffer that the next call overwrites."""
        parameter = member.parameter
        gradient = member.gradient
        if is_sharded(gradient) or not gradient.is_cpu:
            return torch.add(gradient, parameter, alpha=decay)
        buffer = self._scratch.get(gradient.dtype)
        if buffer is None or buffer.numel() < gradient.numel():
            buffer = torch.empty(gradient.numel(), dtype=gradient.dtype)
            self._scratch[gradient.dtype] = buffer
        out = buffer[: gradient.numel()].view_as(gradient)
        return torch.add(gradient, parameter, alpha=decay, out=out)

    def _advance(self, members: Sequence[Member], norms: Tensor) -> Tensor:
        """Update the averages of these tensors; return by how much each gradient is too short."""
        names = [member.name for member in members]
        zero = torch.zeros((), dtype=norms.dtype, device=norms.device)
        averages = torch.stack([self._averages.get(name, zero).to(norms) for name in names])
        moved, excess = average_and_excess(norms, averages, decay=self.options.decay)
        self._averages |= zip(names, moved.unbind(), strict=True)
        self._largest.append(excess.amax())
        return excess.clamp_max(_largest_finite(members))

    def metrics(self) -> dict[str, float]:
        """Return the largest s/g of the last step; 1 where the rule changed nothing."""
        largest_excess = max((excess.item() for excess in self._largest), default=0.0)
        return {"largest_scale": 1.0 + largest_excess}

    def idle_reason(self) -> str:
        """Say why nothing may have changed."""
        if self.options.decay == 0:
            return "decay is 0: the average is the norm itself"
        return (
            "no gradient's norm ever fell below its average "
            "(or there was no first moment to correct)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the average norms by parameter name."""
        return {"averages": {name: average.clone() for name, average in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average norms."""
        self._averages = {name: average.clone() for name, average in state["averages"].items()}


def _share_of_new(group: Mapping[str, Any]) -> float:
    """Return (weight of the new gradient)/(weight of the old moment) in the moment's update.

    Raises:
        RegradError: If the old moment has no weight, so that nothing added to it would have an
            effect.
    """
    if "betas" in group:
        option = "betas[0]"
        kept = group["betas"][0]
        new = 1 - kept
    else:
        option = "momentum"
        kept = group["momentum"]
        new = 1 - group["dampening"]
    if not isinstance(kept, Tensor) and kept == 0:
        raise RegradError(
            f"'adanorm' corrects the first moment: {option} must be positive, got {kept!r}"
        )
    return new / kept  # type: ignore[no-any-return]


def _alike(step: Step, parameters: Sequence[nn.Parameter]) -> list[list[Member]]:
    """Group the parameters that have a gradient by device, dtype and whether they are shards."""
    names = {parameter: name for name, parameter in step.named_parameters()}
    found: dict[Any, list[Member]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if parameter in names and gradient is not None:
            key = (gradient.device, gradient.dtype, is_sharded(gradient))
            found[key].append(Member(names[parameter], parameter, gradient))
    return list(found.values())


def _largest_finite(members: Sequence[Member]) -> float:
    """Return the largest number that the gradients hold; a larger factor would turn 0 to NaN."""
    return torch.finfo(members[0].gradient.dtype).max
