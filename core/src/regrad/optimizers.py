"""Facts about optimizers: parameters, first moment, decay, whether they look ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn, optim

from regrad.correction import Control

FIRST_MOMENTS: dict[type[optim.Optimizer], str] = {
    optim.Adam: "exp_avg",
    optim.AdamW: "exp_avg",
    optim.NAdam: "exp_avg",
    optim.RAdam: "exp_avg",
    optim.Adamax: "exp_avg",
    optim.SGD: "momentum_buffer",
}
"""The key of the first moment in a parameter's state, by class.

Ask for the exact class: other libraries, and subclasses, use the same keys for other things.
"""

DECOUPLED = (optim.AdamW, optim.Adafactor, optim.Muon)
"""Classes of torch whose weight decay is decoupled, although their groups do not say so."""


def parameters_of(optimizer: optim.Optimizer) -> list[nn.Parameter]:
    """Return every parameter of an optimizer in the order of its groups, frozen ones included.

    Example:
        >>> import torch
        >>> [p.numel() for p in parameters_of(torch.optim.SGD(torch.nn.Linear(2, 1).parameters()))]
        [2, 1]
    """
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])
    return parameters


def stepped_by(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Return the optimizer that makes the steps: of a ZeroRedundancyOptimizer the one inside.

    Ask it for the class where that says what a step is; it holds the parameters of this process
    alone.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        >>> stepped_by(optimizer) is optimizer
        True
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, optim.Optimizer) else optimizer


def first_moment_key(optimizer: optim.Optimizer) -> str | None:
    """Return the key under which an optimizer keeps the moving average of the gradients.

    Args:
        optimizer: The innermost torch optimizer.

    Returns:
        A key of `optimizer.state[parameter]`; a parameter's state may lack it, as before the
        first step or for SGD without momentum. None for a class that is not in `FIRST_MOMENTS`.

    Example:
        >>> import torch
        >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
        >>> first_moment_key(torch.optim.AdamW(parameters))
        'exp_avg'
        >>> first_moment_key(torch.optim.Rprop(parameters)) is None
        True
    """
    return FIRST_MOMENTS.get(type(optimizer))


def decoupled_decay(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return the decay rate λ of a step that contains −ηλθ, besides what the gradient moves.

    A group says it itself by "decoupled_weight_decay", as those of torch's Adam do. Of torch's
    other classes, and of pytorch_optimizer's groups, it is known.

    Args:
        optimizer: The innermost optimizer.
        group: One of its parameter groups.

    Returns:
        0 if the decay is added to the gradient, or there is none; None if it is unknown which of
        the two a foreign class does.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1)
        >>> decoupled_decay(optimizer, optimizer.param_groups[0])
        0.1
    """
    decay = float(group.get("weight_decay") or 0.0)
    if not decay:
        return 0.0
    optimizer = stepped_by(optimizer)
    library = type(optimizer).__module__.partition(".")[0]
    is_decoupled = group.get("decoupled_weight_decay")
    if is_decoupled is None and library == "torch":
        is_decoupled = isinstance(optimizer, DECOUPLED)
    if is_decoupled is None and library == "pytorch_optimizer":
        is_decoupled = group.get("weight_decouple")
        # Their "fixed decay" is not multiplied by the rate.
        if is_decoupled and group.get("fixed_decay"):
            return None
    if is_decoupled is None:
        return None
    return decay if is_decoupled else 0.0


def looks_ahead(optimizer: optim.Optimizer) -> bool:
    """Say whether an optimizer takes a Nesterov step itself.

    Args:
        optimizer: The innermost torch optimizer.

    Returns:
        True for NAdam, and if any parameter group has `nesterov=True`.

    Example:
        >>> import torch
        >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
        >>> looks_ahead(torch.optim.SGD(parameters, momentum=0.9, nesterov=True))
        True
    """
    if isinstance(stepped_by(optimizer), optim.NAdam):
        return True
    return any(group.get("nesterov") for group in optimizer.param_groups)


def nesterov_control(optimizer: optim.Optimizer) -> Control | None:
    """Return Nesterov's momentum as the control of a correction that looks ahead.

    Args:
        optimizer: The innermost torch optimizer.

    Returns:
        For torch's SGD with momentum and without dampening `nesterov=True`. For torch's Adam and
        AdamW `torch.optim.NAdam` with the same kind of weight decay, and with torch's default
        `momentum_decay`; None with AMSGrad, which NAdam does not have, without a first moment,
        or where groups decay in both ways. None for any other class, subclasses included.

    Example:
        >>> import torch
        >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
        >>> nesterov_control(torch.optim.SGD(parameters, momentum=0.9)).optimizer
        {'nesterov': True}
        >>> nesterov_control(torch.optim.AdamW(parameters)).optimizer_class
        <class 'torch.optim.nadam.NAdam'>
        >>> nesterov_control(torch.optim.RMSprop(parameters)) is None
        True

    References:
        Dozat, 2016, "Incorporating Nesterov Momentum into Adam".
    """
    kind = type(stepped_by(optimizer))
    if kind is optim.SGD:
        return _nesterov_of_sgd(optimizer)
    if kind in {optim.Adam, optim.AdamW}:
        return _nesterov_of_adam(optimizer)
    return None


def _nesterov_of_sgd(optimizer: optim.Optimizer) -> Control | None:
    for group in optimizer.param_groups:
        if group["momentum"] <= 0 or group["dampening"] != 0:
            return None
    return Control(name="nesterov", optimizer={"nesterov": True})


def _nesterov_of_adam(optimizer: optim.Optimizer) -> Control | None:
    kinds_of_decay = {group["decoupled_weight_decay"] for group in optimizer.param_groups}
    if len(kinds_of_decay) > 1:
        return None
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["betas"][0] <= 0:
            return None
    return Control(
        name="nadam",
        optimizer_class=optim.NAdam,
        optimizer={"decoupled_weight_decay": kinds_of_decay.pop()},
    )
