"""Devices of every kind: their random numbers, and whether a graph of them is being captured."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

HOST = ("cpu", "meta")


def accelerator() -> str | None:
    """Return the type of the accelerator that is there, such as "cuda" or "xpu", or None.

    Example:
        >>> accelerator() in (None, "cuda", "xpu", "mps", "npu")
        True
    """
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return None if current is None else current.type


def is_in_use(kind: str) -> bool:
    """Say whether this process has used a type of device, without starting it."""
    is_initialized = getattr(torch.get_device_module(kind), "is_initialized", None)
    return is_initialized is None or bool(is_initialized())


def is_capturing() -> bool:
    """Say whether a graph of the accelerator is being captured, as torch.cuda.graph does.

    Asked at every step, so that torch's module is looked for only once.
    """
    module = _module_with_graphs()
    if module is None or not module.is_initialized():
        return False
    return bool(module.is_current_stream_capturing())


@functools.cache
def _module_with_graphs() -> Any:
    """Return the module of the accelerator that torch was built for, None without one or graphs."""
    current = torch.accelerator.current_accelerator()
    if current is None:
        return None
    module = torch.get_device_module(current.type)
    return module if hasattr(module, "is_current_stream_capturing") else None


def random_state(device: torch.device) -> Tensor:
    """Return the state of an accelerator's random numbers.

    Args:
        device: With or without a number; without one the current device of its type.
    """
    module: Any = torch.get_device_module(device)
    # There is one device, and the function takes none.
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Take back what `random_state` returned."""
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


@contextlib.contextmanager
def random_numbers_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the global random numbers of the host, and of the tensors' devices, back at the end."""
    devices = {tensor.device for tensor in tensors if tensor.device.type not in HOST}
    host = torch.get_rng_state()
    states = {device: random_state(device) for device in devices}
    try:
        yield
    finally:
        torch.set_rng_state(host)
        for device, state in states.items():
            set_random_state(device, state)
