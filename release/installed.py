"""Prove that a distribution works where it was installed, with nothing but what it needs.

Usage: python installed.py NAME PACKAGE
Imports every module of the package, loads every entry point, and asks the metadata for what a
user sees. Needs the standard library only.
"""

import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path


def modules_of(package: str) -> list[str]:
    """Return the names of a package's modules; a `__main__` would start something."""
    root = importlib.import_module(package)
    found = [one.name for one in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return [name for name in found if not name.endswith("__main__")]


def main(name: str, package: str) -> int:
    """Raise where something is missing; print one line where nothing is."""
    distribution = metadata.distribution(name)
    modules = modules_of(package)
    for module in modules:
        importlib.import_module(module)
    for point in distribution.entry_points:
        point.load()
    folder = Path(importlib.import_module(package).__file__ or "").parent
    if not (folder / "py.typed").is_file():
        raise FileNotFoundError(f"{package} is installed without py.typed")
    if not distribution.metadata.json.get("description"):
        raise ValueError(f"{name} is installed without its README")
    files = distribution.files or []
    if not any(file.parent.name == "licenses" for file in files):
        raise FileNotFoundError(f"{name} is installed without its licence")
    points = len(distribution.entry_points)
    sys.stdout.write(
        f"{name} {distribution.version}: {len(modules) + 1} modules, {points} entry points\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
