"""Options are visible: to `help`, to `inspect.signature`, and to type checkers."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import regrad

ROOT = Path(__file__).parent.parent
CALLS = Path(__file__).parent / "typed_options.py"
CLASSES = [
    kind
    for kind in map(regrad.load, regrad.available())
    if isinstance(kind, type) and kind.__module__.startswith("regrad_")
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)
def test_a_correction_shows_its_options_with_their_types_and_defaults(kind):
    shown = inspect.signature(kind).parameters.values()
    fields = dataclasses.fields(kind.Options)
    assert [(p.name, p.default) for p in shown] == [(f.name, f.default) for f in fields]
    assert all(p.kind is p.KEYWORD_ONLY for p in shown)
    assert not any(isinstance(p.annotation, str) for p in shown)


def calls_in(function: str) -> dict[str, list[ast.Call]]:
    """The calls that a function of `typed_options.py` makes, by what it calls."""
    found: dict[str, list[ast.Call]] = {}
    for node in ast.parse(CALLS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for statement in node.body[1:]:
                found.setdefault(statement.value.func.id, []).append(statement.value)
    return found


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)
def test_type_checkers_are_shown_every_option_of_every_correction(kind):
    calls = calls_in("right_calls")[kind.__name__]
    given = {keyword.arg for call in calls for keyword in call.keywords}
    assert given == {field.name for field in dataclasses.fields(kind.Options)}
    assert len(calls_in("wrong_names")[kind.__name__]) == 1
    assert len(calls_in("wrong_values")[kind.__name__]) == 1


def test_the_type_checker_accepts_right_calls_and_refuses_wrong_ones():
    api = pytest.importorskip("mypy.api", reason="needs mypy, of the group typecheck")
    report, errors, code = api.run(
        ["--strict", "--config-file", str(ROOT / "pyproject.toml"), str(CALLS)]
    )
    assert (code, errors) == (0, ""), report
