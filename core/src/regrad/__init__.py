"""Correct gradients in PyTorch training without touching the loop.

`attach` binds corrections to a model and its optimizer; the loop does not change.
Names are imported when they are first used, so that listing plugins never imports
torch; `__init__.pyi` tells type checkers where they live.

Example:
    >>> import regrad
    >>> sorted(set(regrad.available()) & {"no-such-correction"})
    []
"""

import importlib

_PUBLIC = {
    "attachment": ("Attachment", "attach"),
    "correction": ("Correction",),
    "errors": ("PluginLoadError", "RegradError", "RegradWarning"),
    "hookspecs": ("hookimpl",),
    "registry": ("Composition", "available", "create", "load"),
}


# Not `Any`: `typing` alone takes as long to import as all the rest.
def __getattr__(name: str) -> object:
    for home, names in _PUBLIC.items():
        if name in names:
            return getattr(importlib.import_module(f"regrad.{home}"), name)
    raise AttributeError(f"module 'regrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    public: list[str] = []
    for names in _PUBLIC.values():
        public.extend(names)
    return public
