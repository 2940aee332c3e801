"""Two processes: DDP, FSDP2 and shards, each case of `cases_*.py` a test."""

import ast
import functools
import importlib
import sys
import warnings
from pathlib import Path

import pytest
from regrad_testing.processes import launch

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("cases_*.py"))
CASES = [
    node.name
    for path in FILES
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


class Cases:
    """What both processes run."""

    @classmethod
    def cases(cls):
        sys.path.insert(0, str(HERE))
        modules = [importlib.import_module(path.stem) for path in FILES]
        found = {name: thing for module in modules for name, thing in vars(module).items()}
        return {name: functools.partial(strictly, found[name]) for name in CASES}


def strictly(case, rank):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(rank)


@pytest.fixture(scope="module")
def results():
    """Run every case once on two processes and return, per rank, what each raised."""
    return launch(Cases)


@pytest.mark.parametrize("case", [name.removeprefix("case_") for name in CASES])
def test_on_two_processes(results, case):
    raised = [result[f"case_{case}"] for result in results]
    assert raised == [None, None], "\n".join(said["error"] for said in raised if said)
