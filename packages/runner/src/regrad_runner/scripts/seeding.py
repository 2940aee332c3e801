"""Seeds of a script: set before it starts, and shifted if it sets its own."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

STRIDE = 1000
"""How far the seeds of one run lie from those of the next, where a script sets its own."""
LARGEST_OF_NUMPY = 2**32
PLAIN_GENERATOR = torch.Generator
_under_way = threading.local()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device.

    Args:
        seed: At least 0 and below 2³², which is what NumPy takes.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what a script reads
    torch.manual_seed(seed)


def shift_seeds(seed: int) -> None:
    """Add 1000 · `seed` to every seed that is set from now on, for the rest of the process.

    A script that always sets the same seed trains the same run whatever it is started with. Shifted
    are the numbers given to `torch.manual_seed`, to `manual_seed` and `manual_seed_all` of every
    device's module, as `torch.cuda`, to `torch.Generator.manual_seed`, `numpy.random.seed` and
    `default_rng`, and to `random.seed`. What is not a whole number stays unchanged.

    Args:
        seed: Of the run, at least 0. 0 moves nothing.
    """
    shift = STRIDE * seed
    if shift == 0:
        return
    torch_seed = _shifted(torch.manual_seed, shift)
    torch.manual_seed = torch_seed
    torch.random.manual_seed = torch_seed
    for module in _device_modules():
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                setattr(module, name, _shifted(getattr(module, name), shift))
    np.random.seed = _shifted(np.random.seed, shift, modulo=LARGEST_OF_NUMPY)
    np.random.default_rng = _shifted(np.random.default_rng, shift)
    random.seed = _shifted(random.seed, shift)
    torch.Generator = _shifted_generator(shift)  # type: ignore[misc]


def _device_modules() -> list[ModuleType]:
    """Return what torch has for each type of device whose random numbers can be seeded."""
    modules = [module for module in vars(torch).values() if isinstance(module, ModuleType)]
    return [m for m in modules if hasattr(m, "manual_seed") and m is not torch.random]


def _shifted(
    function: Callable[..., Any], shift: int, *, modulo: int | None = None
) -> Callable[..., Any]:
    """Return a function that moves the whole number that it is given first.

    A seed that one such function hands on to another, as `torch.manual_seed` does to every
    device, is moved once.
    """

    def shifted(*args: Any, **kwargs: Any) -> Any:
        if getattr(_under_way, "is_moved", False):
            return function(*args, **kwargs)
        if args:
            args = (_moved(args[0], shift, modulo), *args[1:])
        else:
            kwargs = {name: _moved(value, shift, modulo) for name, value in kwargs.items()}
        _under_way.is_moved = True
        try:
            return function(*args, **kwargs)
        finally:
            _under_way.is_moved = False

    shifted.__name__ = getattr(function, "__name__", "seed")
    shifted.__doc__ = function.__doc__
    return shifted


def _moved(value: Any, shift: int, modulo: int | None) -> Any:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole:
        return value
    moved = int(value) + shift
    return moved % modulo if modulo is not None else moved


class _AlsoPlain(type(torch.Generator)):  # type: ignore[misc]
    """Lets `isinstance` take generators that were made without a shift, such as torch's own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, PLAIN_GENERATOR)


def _shifted_generator(shift: int) -> type[torch.Generator]:
    """Return torch's generator with seeds that are moved."""

    class Generator(PLAIN_GENERATOR, metaclass=_AlsoPlain):
        def manual_seed(self, seed: int) -> torch.Generator:
            """Set the seed, moved."""
            return super().manual_seed(_moved(seed, shift, None))

    return Generator
