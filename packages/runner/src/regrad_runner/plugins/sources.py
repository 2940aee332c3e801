"""Names found in the source files of installed packages, without importing these."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

NOT_OFFERED = {"lbfgs", "sparseadam", "muon"}


def torch_optimizers() -> list[str]:
    """Return the names of torch's optimizers that the runner trains with, sorted."""
    classes = names_in_source("torch", "optim/*.py", r"^class (\w+)\((?:Optimizer|Adam)\):")
    return sorted({name.lower() for name in classes} - NOT_OFFERED)


def names_in_source(package: str, files: str, pattern: str) -> set[str]:
    """Return what a pattern finds in a package's files, without importing it: that would take seconds."""
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    texts = (path.read_text(encoding="utf-8") for path in folder.glob(files)) if folder else ()
    return {name for text in texts for name in re.findall(pattern, text, flags=re.MULTILINE)}
