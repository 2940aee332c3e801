import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toys():
    """Small modules, data and trainers, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "regrad_lightning_toys", Path(__file__).parent / "toys.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
