"""What a shell offers for half a word: from metadata and source files, so that no torch is imported for a keystroke."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import regrad

OWN_MODELS = ("resnet8", "resnet20", "resnet32", "resnet56", "gpt")
NOT_OFFERED = {"lbfgs", "sparseadam", "muon"}


def corrections(incomplete: str) -> list[str]:
    """Return names of corrections, "all" too; behind a "+" those that can be stacked on what stands before it.

    Example:
        >>> corrections("al")
        ['all']
    """
    before, plus, last = incomplete.rpartition("+")
    names = [*_installed("regrad"), *(() if plus else ("all",))]
    return [f"{before}{plus}{name}" for name in _starting(last, names)]


def optimizers(incomplete: str) -> list[str]:
    """Return names of optimizers: torch's and those of plugins."""
    classes = _found("torch", "optim/*.py", r"^class (\w+)\((?:Optimizer|Adam)\):")
    own = sorted({name.lower() for name in classes} - NOT_OFFERED)
    return _starting(incomplete, [*own, *_installed("regrad.optimizers")])


def workloads(incomplete: str) -> list[str]:
    """Return names of workloads."""
    return _starting(incomplete, _installed("regrad.workloads"))


def models(incomplete: str) -> list[str]:
    """Return names of models: those for small images, the one for text, and torchvision's classifiers."""
    builders = _found("torchvision", "models/*.py", r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(")
    return _starting(incomplete, [*OWN_MODELS, *sorted(builders)])


def plugins(incomplete: str) -> list[str]:
    """Return what `regrad plugins list` lists."""
    groups = ("regrad", "regrad.optimizers", "regrad.workloads")
    return _starting(incomplete, [name for group in groups for name in _installed(group)])


def _installed(group: str) -> list[str]:
    entries = regrad.available(group)
    return [name for name, entry in entries.items() if entry.refused is None and name.isprintable()]


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _found(package: str, files: str, pattern: str) -> set[str]:
    """Return what a pattern finds in a package's files, without importing it: that would take seconds."""
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    texts = (path.read_text(encoding="utf-8") for path in folder.glob(files)) if folder else ()
    return {name for text in texts for name in re.findall(pattern, text, flags=re.MULTILINE)}
