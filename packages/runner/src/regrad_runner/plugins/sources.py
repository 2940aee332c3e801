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
    """Return the names that a pattern finds in a package's files.

    The package is not imported: that would take seconds.

    Args:
        package: Its name; one that is not installed has no names.
        files: Pattern of their paths in the package's folder.
        pattern: With one group, the name.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return set()
    names: set[str] = set()
    for path in Path(spec.origin).parent.glob(files):
        names.update(re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return names
