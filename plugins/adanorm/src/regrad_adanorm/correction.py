"""AdaNorm: gradients enter the first moment at no less than their usual norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any, Literal

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Needs
from regrad.hookspecs import Step
from regrad.optimizers import FIRST_MOMENTS, first_moment_key
from regrad.sharding import is_sharded
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_adanorm.functional import add_scaled_, average_and_excess, norms_of

Member = tuple[str, nn.Parameter, Tensor]
"""(name, parameter, gradient)."""


class AdaNorm(Correction):
    r"""Keep short gradients at their usual norm in the first moment.

    Per tensor, with :math:`e_0 = 0`,

    .. math:: e \leftarrow \gamma e + (1-\gamma)|g|, \qquad
        s = g\,e/|g| \text{ if } e > |g| \text{ else } g.

    The first moment takes s where it took g; the second moment sees g. With
    coupled decay :math:`g + \lambda\theta` takes the place of g in the rule, as the
    optimizer's own. `.grad` is left alone: what the moment will lack is added to it
    just before the step, which is exact on torch's Adam, AdamW, NAdam, RAdam,
    Adamax and SGD with momentum. What these use of the gradient besides, in
    NAdam's and Nesterov's steps, stays g.

    Args:
        decay: :math:`\gamma` in [0, 1), per optimizer step. At 0 nothing changes.
        target: "moment", the paper's rule; "gradient" rescales `.grad` itself, on any
            optimizer, which the paper found to be worse. Decay is not looked at there.

    Raises:
        ValueError: If `decay` is not in [0, 1).
        RegradError: At attach, where the first moment is not known, is off
            (:math:`\beta_1` or the momentum is 0), or parameters are complex.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> attachment = regrad.attach(model, torch.optim.Adam(model.parameters()), [AdaNorm(decay=0.95)])

    References:
        Dubey, Singh and Chaudhuri, 2023, "AdaNorm: Adaptive Gradient Norm Correction
        based Optimizer for CNNs" (arXiv 2210.06364), AdamNorm. We differ where a
        gradient is zero or not finite, and may be used on any of six optimizers.
    """

    name = "adanorm"
    needs = Needs(
        stages=("gradient", "moment"),
        layouts=("plain", "ddp", "fsdp2"),
        reads=("tensor", "moments"),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How long norms are remembered, and what is kept at them."""

        decay: float = 0.95
        target: Literal["moment", "gradient"] = "moment"

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = with_changes(self.needs, stages=(self.options.target,))
        self._averages: dict[str, Tensor] = {}
        self._largest: list[Tensor] = []
        self._scratch: dict[torch.dtype, Tensor] = {}

    def setup(self, attachment: Attachment) -> None:
        """Refuse what has no first moment, or none that is known."""
        optimizer = attachment.optimizer
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise RegradError(
                "'adanorm' has no rule for complex parameters; train them with a separate optimizer"
            )
        if self.options.target == "gradient":
            return
        if first_moment_key(optimizer) is None:
            known = ", ".join(kind.__name__ for kind in FIRST_MOMENTS)
            raise RegradError(
                f"'adanorm' must know where {type(optimizer).__name__} keeps its first moment, as it does for torch's "
                f"own {known}; use one of them, or target='gradient'"
            )
        for group in optimizer.param_groups:
            _share_of_new(group)

    def correct_gradients(self, step: Step) -> None:
        """Rescale `.grad`, where that is the target."""
        if self.options.target != "gradient":
            return
        self._largest = []
        for members in _alike(step, step.parameters):
            gradients = [gradient for _, _, gradient in members]
            excess = self._advance(members, norms_of(gradients))
            add_scaled_(gradients, gradients, excess)

    def correct_moments(self, step: Step) -> None:
        """Add to the first moments what they will lack, where they are the target."""
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
        key = FIRST_MOMENTS[type(optimizer)]
        share = _share_of_new(group)
        sign = -1.0 if group["maximize"] else 1.0
        decay = 0.0 if group.get("decoupled_weight_decay") else sign * group["weight_decay"]
        excess = self._advance(members, self._norms(members, decay))
        factors = (excess * (sign * share)).clamp(
            -_largest_finite(members), _largest_finite(members)
        )
        states = [optimizer.state.get(parameter, {}).get(key) for _, parameter, _ in members]
        # Where there is no moment yet, nothing is due at e_0 = 0; after a restored e it waits for the state.
        if not any(state is None for state in states):
            self._add(states, members, decay, factors)
            return
        ready = [index for index, state in enumerate(states) if state is not None]
        if ready:
            chosen = torch.stack([factors[index] for index in ready])
            self._add(
                [states[index] for index in ready],
                [members[index] for index in ready],
                decay,
                chosen,
            )

    def _norms(self, members: Sequence[Member], decay: float) -> Tensor:
        """Return the norms of g + decay·θ, shape [n]."""
        if not decay:
            return norms_of([gradient for _, _, gradient in members])
        return torch.cat([norms_of([self._decayed(member, decay)]) for member in members])

    def _add(
        self, states: Sequence[Tensor], members: Sequence[Member], decay: float, factors: Tensor
    ) -> None:
        """Add factor·(g + decay·θ) to each state."""
        if not decay:
            add_scaled_(states, [gradient for _, _, gradient in members], factors)
            return
        on_host = factors.device.type == "cpu"
        for state, member, factor in zip(states, members, factors.unbind(), strict=True):
            if not on_host or factor.item():
                add_scaled_([state], [self._decayed(member, decay)], factor.reshape(1))

    def _decayed(self, member: Member, decay: float) -> Tensor:
        """Return g + decay·θ, in a buffer that the next call overwrites."""
        _, parameter, gradient = member
        if is_sharded(gradient) or not gradient.is_cpu:
            return torch.add(gradient, parameter, alpha=decay)
        if (
            gradient.dtype not in self._scratch
            or self._scratch[gradient.dtype].numel() < gradient.numel()
        ):
            self._scratch[gradient.dtype] = torch.empty(gradient.numel(), dtype=gradient.dtype)
        out = self._scratch[gradient.dtype][: gradient.numel()].view_as(gradient)
        return torch.add(gradient, parameter, alpha=decay, out=out)

    def _advance(self, members: Sequence[Member], norms: Tensor) -> Tensor:
        """Update the averages of these tensors; return by how much each gradient is too short."""
        names = [name for name, _, _ in members]
        zero = torch.zeros((), dtype=norms.dtype, device=norms.device)
        averages = torch.stack([self._averages.get(name, zero).to(norms) for name in names])
        moved, excess = average_and_excess(norms, averages, decay=self.options.decay)
        self._averages |= zip(names, moved.unbind(), strict=True)
        self._largest.append(excess.amax())
        return excess.clamp_max(_largest_finite(members))

    def metrics(self) -> dict[str, float]:
        """Return the largest s/g of the last step; 1 where the rule changed nothing."""
        return {"largest_scale": 1.0 + max((x.item() for x in self._largest), default=0.0)}

    def idle_reason(self) -> str:
        """Say why nothing may have changed."""
        if self.options.decay == 0:
            return "decay is 0: the average is the norm itself"
        return "no gradient's norm ever fell below its average (or no first moment was there to correct)"

    def state_dict(self) -> dict[str, Any]:
        """Return the average norms by parameter name."""
        return {"averages": {name: average.clone() for name, average in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the average norms."""
        self._averages = {name: average.clone() for name, average in state["averages"].items()}


def _share_of_new(group: Mapping[str, Any]) -> float:
    """Return (weight of the new gradient)/(weight of the old moment) in the moment's update.

    Raises:
        RegradError: If the old moment has no weight: nothing added to it would be read.
    """
    kept = group["betas"][0] if "betas" in group else group["momentum"]
    if not isinstance(kept, Tensor) and kept == 0:
        option = "betas[0]" if "betas" in group else "momentum"
        raise RegradError(
            f"'adanorm' corrects the first moment: {option} must be positive, got {kept!r}"
        )
    new = 1 - (kept if "betas" in group else group["dampening"])
    return new / kept  # type: ignore[no-any-return]


def _alike(step: Step, parameters: Sequence[nn.Parameter]) -> Iterator[list[Member]]:
    """Collect the parameters that have a gradient by device, dtype and whether they are shards."""
    names = dict(zip(step.parameters, step.names, strict=True))
    found: dict[Any, list[Member]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if parameter in names and gradient is not None:
            key = (gradient.device, gradient.dtype, is_sharded(gradient))
            found[key].append((names[parameter], parameter, gradient))
    yield from found.values()


def _largest_finite(members: Sequence[Member]) -> float:
    """Return the largest number that a gradient can hold: a factor beyond it would make NaN of a zero."""
    return torch.finfo(members[0][2].dtype).max
