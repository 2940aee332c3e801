"""Where a step waits for its GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error where code waits for a CUDA device. Without one nothing is watched.

    torch sees most of what waits, such as reading a tensor as a number, but not all of it.

    Raises:
        RuntimeError: At the operation that waits.

    Example:
        >>> with no_waiting():
        ...     total = torch.ones(3).sum()
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    _watch("error")
    try:
        yield
    finally:
        _watch(before)


def _watch(mode: int | str) -> None:
    with warnings.catch_warnings():
        # It says, once, that the mode is a prototype.
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)
