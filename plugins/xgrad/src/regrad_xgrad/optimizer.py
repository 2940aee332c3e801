"""AdaM3: an optimizer whose second moment is taken of the momentum."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from regrad.sharding import locals_of, reduce_gradients
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_xgrad.functional import adam3_


class AdaM3(Optimizer):
    r"""Momentum over the root of the momentum's own second moment.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1)\, g \\
        v &\leftarrow \beta_2 v + (1-\beta_2)\, m^2 + \epsilon \\
        \theta &\leftarrow \theta - \eta\lambda\theta
            - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}}.

    The m in v is not corrected for its bias: on a constant gradient the first three
    steps are 10, 6.6 and 5.0 times the rate. Warm the rate up.

    Args:
        params: Parameters, named parameters, or dicts of groups. Real, dense, and of a
            dtype in which `eps` is not 0 (so not float16).
        lr: :math:`\eta`, at least 0; a float, or a tensor of one element.
        betas: :math:`\beta_1` and :math:`\beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in the units of the squared gradient. Positive.
        weight_decay: :math:`\lambda`, decoupled as in AdamW, at least 0.
        maximize: Climb instead of descend.
        foreach: One launch per operation for all tensors; None: where they are on an
            accelerator. A loop is faster on a CPU.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex or float16.
        RuntimeError: At a step, if a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdaM3([weight], lr=0.01)
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000])

    References:
        Wang, Kang, Qin, Wang, Xu, Zhang and Fu, 2023, "Momentum is All You Need for
        Data-Driven Adaptive Optimization", ICDM.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,  # as torch's groups say it
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, also of a version whose groups did not say that the decay is decoupled."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own or the defaults.

        Raises:
            ValueError: If an option is out of range, or a parameter is complex or float16.
        """
        given = {**self.defaults, **param_group}
        _check(given)
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                _check_dtype(parameter, given["eps"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient is sparse; nothing is changed in that case.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_dense(group["params"])
        for group in self.param_groups:
            reduce_gradients(group["params"])
            for parameters in _together(group):
                self._step_of(parameters, group)
        return loss

    def _step_of(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move parameters of one group, device and dtype."""
        states = [self._state_of(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        adam3_(
            locals_of(parameters),
            locals_of(p.grad for p in parameters if p.grad is not None),
            locals_of(state["exp_avg"] for state in states),
            locals_of(state["exp_avg_sq"] for state in states),
            lr=group["lr"],
            steps=[state["step"].item() for state in states],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of a parameter, zero at first. The step count stays on the CPU."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _together(group: dict[str, Any]) -> list[list[nn.Parameter]]:
    """Return the parameters with a gradient that move in one launch: alike, or each alone."""
    found: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        foreach = group["foreach"]
        if foreach is None:
            foreach = parameter.device.type != "cpu"
        found[(parameter.device, parameter.dtype) if foreach else parameter].append(parameter)
    return list(found.values())


def _check_dense(parameters: Iterable[nn.Parameter]) -> None:
    """Raise `RuntimeError` if a gradient is sparse."""
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise RuntimeError(
            "gradients must be dense, got a sparse one; use sparse=False, or torch.optim.SparseAdam"
        )


def _check(group: dict[str, Any]) -> None:
    """Raise `ValueError` if an option is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr must be a number or a tensor of one element, got shape {list(lr.shape)}"
            )
    elif not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be at least 0 and finite, got {lr!r}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    if not (group["eps"] > 0 and math.isfinite(group["eps"])):
        raise ValueError(f"eps must be positive and finite, got {group['eps']!r}")
    if not (group["weight_decay"] >= 0 and math.isfinite(group["weight_decay"])):
        raise ValueError(
            f"weight_decay must be at least 0 and finite, got {group['weight_decay']!r}"
        )


def _check_dtype(parameter: Tensor, eps: float) -> None:
    """Raise `ValueError` if the rule is not defined, or 0/0."""
    if not parameter.is_floating_point():
        raise ValueError(f"parameters must be real and floating point, got {parameter.dtype}")
    if torch.tensor(eps, dtype=parameter.dtype) == 0:
        raise ValueError(
            f"eps must not vanish in {parameter.dtype}, got {eps!r}; keep the weights in float32"
        )
