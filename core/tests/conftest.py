import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Run by processes of their own, see test_processes.py.
collect_ignore_glob = ["cases_*.py", "shared_cases.py"]


def _load(name):
    spec = importlib.util.spec_from_file_location(f"regrad_core_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Pickle and the annotations of options look a module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toys():
    """Small corrections and models, from the file beside this one."""
    return _load("toys")


@pytest.fixture(scope="session")
def same_bits():
    """Compare nested containers of tensors and plain values bit for bit, NaN and signed zero included."""

    def same(one, other):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            plain = one.dtype == other.dtype and one.shape == other.shape
            raw = (
                [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
                if plain
                else []
            )
            return plain and torch.equal(*raw)
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            return len(one) == len(other) and all(map(same, one, other))
        return type(one) is type(other) and one == other

    return same


@pytest.fixture(scope="session")
def hooks_on():
    """Return every hook dictionary of a model, its submodules and an optimizer, as names and contents."""

    def hooks(model, optimizer):
        owners = [*model.named_modules(), ("optimizer", optimizer)]
        return {
            (owner_name, key): list(value.items())
            for owner_name, owner in owners
            for key, value in vars(owner).items()
            if "hook" in key and isinstance(value, dict)
        }

    return hooks


@pytest.fixture(scope="session")
def python():
    """Run Python code in a process of its own and return what it printed."""

    def run(code, **environment):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
