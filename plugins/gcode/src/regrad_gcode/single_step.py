r"""One step of the solvers with fixed steps, from t = 0 to t = 1.

These are torchdiffeq's methods of the same names, with its coefficients. Times are numbers here.
torchdiffeq holds them on the device and compares them there, so that every solution would wait
for the device eight times.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

Derivative = Callable[[float, Tensor], Tensor]


def euler(field: Derivative, start: Tensor) -> Tensor:
    r"""Return :math:`x + \varphi(0, x)`.

    Example:
        >>> import torch
        >>> euler(lambda time, state: 2 * state + time, torch.tensor([1.0]))
        tensor([3.])
    """
    return start + field(0.0, start)


def midpoint(field: Derivative, start: Tensor) -> Tensor:
    r"""Return :math:`x + \varphi(1/2, x + \varphi(0, x) / 2)`.

    Example:
        >>> import torch
        >>> midpoint(lambda time, state: 2 * state + time, torch.tensor([1.0]))
        tensor([5.5000])
    """
    half = start + field(0.0, start) * 0.5
    return start + field(0.5, half)


def heun3(field: Derivative, start: Tensor) -> Tensor:
    r"""Return a step of Heun's method of third order.

    Example:
        >>> import torch
        >>> heun3(lambda time, state: 3 * time**2 + 0 * state, torch.tensor([1.0]))  # x = 1 + t³
        tensor([2.])
    """
    first = field(0.0, start)
    second = field(1 / 3, start + first * (1 / 3))
    third = field(2 / 3, start + second * (2 / 3))
    return start + (first * 0.25 + third * 0.75)


def rk4(field: Derivative, start: Tensor) -> Tensor:
    r"""Return a step of the 3/8 rule, a Runge-Kutta method of fourth order.

    Example:
        >>> import torch
        >>> rk4(lambda time, state: 4 * time**3 + 0 * state, torch.tensor([1.0]))  # x = 1 + t⁴
        tensor([2.])
    """
    first = field(0.0, start)
    second = field(1 / 3, start + first * (1 / 3))
    third = field(2 / 3, start + (second - first * (1 / 3)))
    fourth = field(1.0, start + (first - second + third))
    return start + (first + 3 * (second + third) + fourth) * 0.125


SOLVERS: Mapping[str, Callable[[Derivative, Tensor], Tensor]] = {
    "euler": euler,
    "midpoint": midpoint,
    "heun3": heun3,
    "rk4": rk4,
}
