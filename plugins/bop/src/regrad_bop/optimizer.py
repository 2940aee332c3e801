"""Bop and Bop2ndOrder: optimizers that flip weights of -1 and +1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from regrad.sharding import locals_of, reduce_gradients
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_bop.checks import check_dense, check_group, check_parameter
from regrad_bop.functional import Evidence, bop2_, bop_
from regrad_bop.real import new_real_state, step_real_
from regrad_bop.signs import refuse_other_values

BETAS = (0.9, 0.999)


class SignFlips(Optimizer):
    """What Bop and Bop2ndOrder share: groups of signs that they flip, and groups for AdamW.

    A subclass says in `moments` what it keeps of a binary weight, and flips in `flip`.

    Args:
        params: Parameters, named parameters, or dicts of groups.
        defaults: The options of a group that does not set them, as torch's optimizers have them.
    """

    moments: tuple[str, ...]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_group({**defaults, "binary": True})
        super().__init__(params, {**defaults, "binary": False})

    @property
    def discrete_weights(self) -> bool:
        """Whether weights hold single values with none in between: regrad will not move them."""
        return any(group["binary"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own or the defaults.

        Args:
            param_group: With `binary=True` for weights of -1 and +1. Any other is updated as by
                AdamW; its `lr` is `real_lr` unless it sets one.

        Raises:
            ValueError: If an option is out of range, or a parameter has no rule.
        """
        group = dict(param_group)
        given = {**self.defaults, **group}
        if not given["binary"]:
            given["lr"] = group.setdefault("lr", given["real_lr"])
        check_group(given)
        super().add_param_group(group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                check_parameter(parameter, given)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient is sparse.
            ValueError: In a weight's first step, if a group with `binary=True` holds anything
                but -1 and +1. In either case nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_dense(group["params"])
        for index, group in enumerate(self.param_groups):
            if group["binary"]:
                self._check_signs(group, index)
        for group in self.param_groups:
            reduce_gradients(group["params"])
            alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._step_of(parameters, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments of binary weights keep their number format.

        torch casts state to the format of the weights, and moments in bf16 stand still at
        rates such as 1e-4.

        Args:
            state_dict: What `state_dict` of the same class returned.
        """
        super().load_state_dict(state_dict)
        saved_states = state_dict["state"]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if not group["binary"]:
                continue
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name in set(self.moments) & set(saved_states.get(key, ())):
                    wide = saved_states[key][name]
                    self.state[parameter][name] = wide.to(parameter.device)

    def flip(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[Any], group: Any
    ) -> None:
        """Take the step of some binary weights, in place; a subclass must implement it.

        Args:
            weights: The local parts, of one device and dtype.
            gradients: Shapes of `weights`.
            states: The state of each, its `step` counted up.
            group: Options.
        """
        raise TypeError(f"{type(self).__name__} must implement flip")

    def _check_signs(self, group: dict[str, Any], index: int) -> None:
        """Refuse a weight that is about to take its first step and is no sign."""
        names = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            if parameter.grad is None or self.state.get(parameter):
                continue
            name = repr(names[place]) if names else f"{place} of group {index}"
            refuse_other_values(parameter, name)

    def _step_of(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move parameters of one group, device and dtype."""
        states = [self._state_of(parameter, group) for parameter in parameters]
        if not group["binary"]:
            step_real_(parameters, states, group)
            return
        for state in states:
            state["step"] += 1
        gradients = locals_of(p.grad for p in parameters if p.grad is not None)
        self.flip(locals_of(parameters), gradients, states, group)

    def _state_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, zero at first. The step count stays on the CPU."""
        state: dict[str, Any] = self.state[parameter]
        if state:
            return state
        if not group["binary"]:
            state.update(new_real_state(parameter))
            return state
        state["step"] = torch.zeros((), dtype=torch.float32)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        for key in self.moments:
            state[key] = torch.zeros_like(
                parameter, dtype=wide, memory_format=torch.preserve_format
            )
        return state


class Bop(SignFlips):
    r"""Flip a binary weight where the average of its gradients is strong enough against it.

    .. math::
        m &\leftarrow (1-\gamma)\, m + \gamma g, \quad m_0 = 0 \\
        w &\leftarrow -w \text{ where } w\, m > \tau

    for the groups with `binary=True`, whose weights are -1 and +1. All other groups are updated
    as by AdamW. With :math:`\tau = 0`, w is the sign of a latent weight that SGD trains with rate
    :math:`\gamma`, weight decay 1 and the identity as estimator, from 0: that is -m.

    Args:
        params: Dicts of groups; the binary ones with `binary=True`. Parameters without a group
            are real. Real numbers, dense.
        lr: :math:`\gamma` of the binary groups, in [0, 1]; a float, or a tensor of one element.
            It is the learning rate that schedulers move.
        threshold: :math:`\tau`, in the units of the gradient, at least 0.
        real_lr: Learning rate of the real groups that set no `lr` of their own, at least 0.
        betas: Of AdamW for the real groups, each in [0, 1).
        eps: Of AdamW, in the units of the gradient. Positive.
        weight_decay: Of AdamW, decoupled, at least 0. Binary weights do not decay.
        maximize: Climb instead of descend.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex. At a step, if a
            binary group holds other values than -1 and +1.
        RuntimeError: At a step, if a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = Bop([{"params": [weight], "binary": True}], lr=0.1, threshold=0.01)
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([-1., -1.])

    References:
        Helwegen, Widdicombe, Geiger, Liu, Cheng and Nusselder, 2019, "Latent Weights Do Not
        Exist: Rethinking Binarized Neural Network Optimization" (arXiv 1906.02107). Where
        :math:`w\,m = \tau` their file sets +1, ours keeps w. One optimizer for real weights too
        is ours.
    """

    moments = ("moment",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        *,
        threshold: float = 1e-8,
        real_lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "real_lr": real_lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def flip(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[Any], group: Any
    ) -> None:
        """Take Bop's step of some binary weights, in place."""
        bop_(
            weights,
            gradients,
            locals_of(state["moment"] for state in states),
            rate=group["lr"],
            threshold=group["threshold"],
            maximize=group["maximize"],
        )


class Bop2(SignFlips):
    r"""Flip a binary weight where its gradients are strong against it, relative to their size.

    .. math::
        m &\leftarrow (1-\gamma)\, m + \gamma g, \quad m_0 = 0 \\
        v &\leftarrow (1-\sigma)\, v + \sigma g^2, \quad v_0 = 0 \\
        w &\leftarrow -w \text{ where }
            w\, \frac{m / c_m}{\sqrt{v / c_v} + 10^{-10}} > \tau

    for the groups with `binary=True`, whose weights are -1 and +1. All other groups are updated
    as by AdamW. The biased rule has :math:`c_m = c_v = 1`. There the ratio is
    :math:`\gamma/\sqrt\sigma` for every weight at the first step: where that exceeds
    :math:`\tau`, as with the published numbers, half of all weights flip whatever the data say,
    and the initial weights are lost. `warmup_steps` gathers m and v first.

    Args:
        params: Dicts of groups; the binary ones with `binary=True`. Parameters without a group
            are real. Real numbers, dense.
        lr: :math:`\gamma` of the binary groups, in [0, 1]; a float, or a tensor of one element.
            It is the learning rate that schedulers move.
        threshold: :math:`\tau`, without a unit, at least 0.
        second_rate: :math:`\sigma`, in (0, 1].
        unbiased: Divide by :math:`c_m = 1 - \prod_s (1-\gamma_s)` and
            :math:`c_v = 1-(1-\sigma)^t`, the weights of all gradients so far in m and v.
        warmup_steps: Steps of a weight in which it does not flip, at least 0; 0 is the published
            rule.
        real_lr: Learning rate of the real groups that set no `lr` of their own, at least 0.
        betas: Of AdamW for the real groups, each in [0, 1).
        eps: Of AdamW, in the units of the gradient. Positive.
        weight_decay: Of AdamW, decoupled, at least 0. Binary weights do not decay.
        maximize: Climb instead of descend.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex. At a step, if a
            binary group holds other values than -1 and +1.
        RuntimeError: At a step, if a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = Bop2([{"params": [weight], "binary": True}])
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([-1., -1.])

    References:
        Suarez-Ramirez, Gonzalez-Mendoza, Chang, Ochoa-Ruiz and Duran-Vega, 2021, "A Bop and
        Beyond: A Second Order Optimizer for Binarized Neural Networks" (arXiv 2104.05124). With
        a rate that changes, :math:`1-(1-\gamma)^t` is not the weight of the gradients in m, and
        falls to 0 with the rate, so that every flip is allowed; the product is ours, and the
        same where the rate is constant. So is `warmup_steps`.
    """

    moments = ("moment", "square")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-7,
        *,
        threshold: float = 1e-6,
        second_rate: float = 1e-3,
        unbiased: bool = False,
        warmup_steps: int = 0,
        real_lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "second_rate": second_rate,
            "unbiased": unbiased,
            "warmup_steps": warmup_steps,
            "real_lr": real_lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def flip(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[Any], group: Any
    ) -> None:
        """Take Bop2ndOrder's step of some binary weights, in place."""
        totals = None
        if group["unbiased"]:
            totals = [_totals(state, group) for state in states]
        bop2_(
            weights,
            gradients,
            Evidence(
                first=locals_of(state["moment"] for state in states),
                second=locals_of(state["square"] for state in states),
            ),
            rate=group["lr"],
            second_rate=group["second_rate"],
            threshold=group["threshold"],
            totals=totals,
            may_flip=[state["step"].item() > group["warmup_steps"] for state in states],
            maximize=group["maximize"],
        )


def _totals(state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float]:
    """Return the weights of all gradients so far in m and in v, and count this step's.

    Logarithms, since 1 - 1e-7 to the power of t cancels. Kept as a number: torch would cast a
    tensor to the format of the weights when it loads the state.
    """
    rate = float(group["lr"])
    log_left = -math.inf if rate == 1 else math.log1p(-rate)
    state["log_left"] = state.get("log_left", 0.0) + log_left
    second_rate = group["second_rate"]
    log_left_of_second = -math.inf
    if second_rate < 1:
        log_left_of_second = state["step"].item() * math.log1p(-second_rate)
    return -math.expm1(state["log_left"]), -math.expm1(log_left_of_second)
