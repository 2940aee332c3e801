"""Correct gradients in PyTorch training without touching the loop.

`attach` binds corrections to a model and its optimizer; the loop stays as it is.
Names are imported when they are first used, so that listing plugins never imports
torch.

Example:
    >>> import regrad
    >>> sorted(set(regrad.available()) & {"no-such-correction"})
    []
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrad.attachment import Attachment, attach
    from regrad.correction import Correction
    from regrad.errors import PluginLoadError, RegradError, RegradWarning
    from regrad.hookspecs import hookimpl
    from regrad.registry import Composition, available, create, load

__all__ = [
    *("Attachment", "Composition", "Correction", "PluginLoadError", "RegradError", "RegradWarning"),
    *("attach", "available", "create", "hookimpl", "load"),
]
_HOMES = ("registry", "correction", "errors", "hookspecs", "attachment")


def __getattr__(name: str) -> Any:
    homes = (importlib.import_module(f"regrad.{home}") for home in _HOMES if name in __all__)
    for home in homes:
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module 'regrad' has no attribute {name!r}")
