"""Tom: an optimizer that adds the trend of the gradients to the momentum."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from regrad.sharding import locals_of, reduce_gradients
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_tom.functional import Trends, tom_

STATES = ("forecast", "trend", "square", "last_gradient")


class Tom(Optimizer):
    r"""Momentum with the trend of the gradients, over Adam's second moment.

    .. math::
        m &\leftarrow \beta_1 (m + r) + (1-\beta_1)\, g \\
        r &\leftarrow \beta_2 r + (1-\beta_2)(g - g_{t-1}), \quad g_0 = 0 \\
        v &\leftarrow \beta_3 v + (1-\beta_3)\, g^2 \\
        \theta &\leftarrow \theta - \eta\lambda\theta
            - \eta\, \frac{(m + r)/c}{\sqrt{v/(1-\beta_3^t)} + \epsilon}

    with c = 1, or :math:`1-(\beta_1\beta_2)^t`. On a constant gradient of either
    sign steps are .11, .21, .71, 1.06, 1.04, 1.01, 1.00 times the rate at t = 1, 2,
    10, 50, 100, 200, 400: c = 1 is a warm-up. State: four copies of the weights
    (`forecast` m + r, `trend` r, `square` v, `last_gradient`).

    Args:
        params: Parameters, named parameters, or dicts of groups. Real, dense, and of a
            dtype in which `eps` is not 0 (so not float16).
        lr: :math:`\eta`, at least 0; a float, or a tensor of one element.
        betas: :math:`\beta_1` (level), :math:`\beta_2` (trend), :math:`\beta_3` (second
            moment), each in [0, 1).
        eps: :math:`\epsilon`, in the units of the gradient. Positive.
        weight_decay: :math:`\lambda`, decoupled as in AdamW, at least 0. The authors'
            file couples it: there it enters the trend too.
        correct_bias: Divide m + r by :math:`1-(\beta_1\beta_2)^t`, the authors' variant.
        maximize: Climb instead of descend.
        foreach: One launch per operation for all tensors; None: where they are on an
            accelerator. A loop is faster on a CPU.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex or float16.
        RuntimeError: At a step, if a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Tom([weight], lr=0.1)
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9890])

    References:
        Maiya, Sricharan, Pandey and K S, 2021, "TOM: Leveraging trend of the gradients
        for faster convergence" (arXiv 2109.03820). Decoupled decay is ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.99, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,  # as torch's groups say it
            "correct_bias": correct_bias,
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
            alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._step_of(parameters, group)
        return loss

    def _step_of(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move parameters of one group, device and dtype."""
        states = [self._state_of(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        foreach = group["foreach"]
        if foreach is None:
            foreach = parameters[0].device.type != "cpu"
        tom_(
            locals_of(parameters),
            locals_of(p.grad for p in parameters if p.grad is not None),
            Trends(
                forecast=locals_of(state["forecast"] for state in states),
                trend=locals_of(state["trend"] for state in states),
                square=locals_of(state["square"] for state in states),
                last=locals_of(state["last_gradient"] for state in states),
            ),
            lr=group["lr"],
            steps=[state["step"].item() for state in states],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            correct_bias=group["correct_bias"],
            maximize=group["maximize"],
            foreach=foreach,
        )

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of a parameter, zero at first. The step count stays on the CPU."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in STATES:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


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
    if len(group["betas"]) != 3 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be three numbers in [0, 1), got {group['betas']!r}")
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
