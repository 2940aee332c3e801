"""The first line of a docstring, read from a package's files and never by importing it."""

import importlib
import inspect
import sys

import pytest
import regrad
from regrad.registry import GROUPS
from regrad_runner.plugins.sources import line_of

FILES = {
    "__init__.py": """
from described.rule import Rule, Silent
from .deeper import (
    Deep,
    Moved as Other,
)
raise RuntimeError("it was imported")
""",
    "rule.py": """
class Before:
    pass


class Rule(dict):
    '''Not these quotes.'''


class Silent:
    def method(self):
        \"\"\"Describe the method, and not its class.\"\"\"


class Plain(
    dict,
):
    r\"\"\"Shrink \\lambda a little.

    And more.
    \"\"\"


def load(mode: str = "a: b"):
    \"\"\"Return the digits: all of them.\"\"\"


made = Plain(
    "a", "b"
)
\"\"\"Digits that were made.\"\"\"

alone = Plain()

broken = (
\"\"\"No.\"\"\"
""",
    "deeper/__init__.py": "from .still import Deep\n",
    "deeper/still.py": 'class Deep:\n    """Look deep."""\n',
    "circle.py": "from described.circle import Round\n",
    "bytes.py": "",
}


@pytest.fixture
def described(tmp_path, monkeypatch):
    """Write a package that raises where it is imported."""
    for name, text in FILES.items():
        path = tmp_path / "described" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "described" / "bytes.py").write_bytes(b"class Odd:\n    \xff")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("described:Deep", "Look deep"),
        ("described.rule:Plain", r"Shrink \lambda a little"),
        ("described.rule:load", "The digits: all of them"),
        ("described.rule:made", "Digits that were made"),
        ("described.rule:alone", ""),
        ("described.rule:broken", ""),
        ("described.rule:Silent", ""),
        ("described:Silent", ""),
        ("described.rule:Nobody", ""),
        ("described.circle:Round", ""),
        ("described.bytes:Odd", ""),
        ("described.none:Rule", ""),
        ("nobody_has_this:Rule", ""),
        ("../described:Rule", ""),
        ("described:Rule(x", ""),
        ("", ""),
    ],
)
def test_a_line_is_found_where_it_stands_and_nowhere_else(value, line):
    assert line_of(value) == line
    assert "described" not in sys.modules


@pytest.mark.parametrize("name", sorted(regrad.available()))
def test_the_line_of_an_installed_correction_is_that_of_its_docstring(name):
    loaded = regrad.load(name)
    if isinstance(loaded, regrad.Composition):
        pytest.skip("several corrections under one name have no docstring of their own")
    first = inspect.getdoc(loaded).partition("\n")[0]
    assert line_of(regrad.available()[name].value) == first.rstrip(".")


def test_every_workload_and_optimizer_has_a_line_of_its_own():
    lines = []
    for group in (GROUPS["workload"], GROUPS["optimizer"]):
        lines += [line_of(entry.value) for entry in regrad.available(group).values()]
    assert "" not in lines
    assert len(set(lines)) == len(lines)
