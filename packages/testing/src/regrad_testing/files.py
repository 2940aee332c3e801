"""Import test files by their path: a suite in a worker process, a reference beside a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_file(path: Path, name: str) -> ModuleType:
    """Import a file under a name of its own, which pickle and annotations can look up."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"suite must be in a Python file, got '{path}'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_beside(file: str, name: str) -> ModuleType:
    """Import the module NAME from the folder of a test file: `load_beside(__file__, "reference")`.

    Args:
        file: The test's `__file__`.
        name: Of the module beside it.

    Returns:
        The module, under a name that no other folder's module gets.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(file).with_name(f"{name}.py").resolve()
    return load_file(path, "_".join(("beside", *path.with_suffix("").parts[-3:])).replace("-", "_"))
