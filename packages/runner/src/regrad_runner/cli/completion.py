"""Shell completion.

All of it comes from metadata and source files, so that no torch is imported for a keystroke.
"""

from __future__ import annotations

from collections.abc import Iterable

import regrad

from regrad_runner.plugins.sources import names_in_source, torch_optimizers

OWN_MODELS = (
    *("resnet8", "resnet20", "resnet32", "resnet56"),
    *("multiexit8", "multiexit20", "multiexit32", "multiexit56"),
    *("binary-cnn", "gpt"),
)
PLUGIN_GROUPS = ("regrad", "regrad.optimizers", "regrad.workloads", "regrad.layouts")


def corrections(incomplete: str) -> list[str]:
    """Return names of corrections, and "all"; after a "+" those that can be stacked.

    Example:
        >>> corrections("al")
        ['all']
    """
    before, plus, last = incomplete.rpartition("+")
    names = _installed("regrad")
    if not plus:
        names.append("all")
    return [f"{before}{plus}{name}" for name in _starting(last, names)]


def optimizers(incomplete: str) -> list[str]:
    """Return names of optimizers: torch's and those of plugins."""
    return _starting(incomplete, [*torch_optimizers(), *_installed("regrad.optimizers")])


def workloads(incomplete: str) -> list[str]:
    """Return names of workloads."""
    return _starting(incomplete, _installed("regrad.workloads"))


def models(incomplete: str) -> list[str]:
    """Return names of models: for images, for text, and torchvision's classifiers."""
    builders = names_in_source(
        "torchvision", "models/*.py", r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\("
    )
    return _starting(incomplete, [*OWN_MODELS, *sorted(builders)])


def plugins(incomplete: str) -> list[str]:
    """Return what `regrad plugins list` lists."""
    names: list[str] = []
    for group in PLUGIN_GROUPS:
        names += _installed(group)
    return _starting(incomplete, names)


def _installed(group: str) -> list[str]:
    entries = regrad.available(group)
    return [name for name, entry in entries.items() if entry.refused is None and name.isprintable()]


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
