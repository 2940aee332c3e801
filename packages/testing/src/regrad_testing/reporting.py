"""What pytest saw of suites, clause by clause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from regrad_testing.settings import SuiteBase


@dataclass
class Row:
    """One clause of one suite.

    Attributes:
        suite: Name of the class.
        clause: Its name.
        proves: What its success means.
        outcome: "proved", "skipped" or "failed".
        reason: Why it was skipped or failed, or what it measured; one line.
        details: Everything that pytest printed about a failure.
    """

    suite: str
    clause: str
    proves: str
    outcome: str = "proved"
    reason: str = ""
    details: str = ""


class Recorder:
    """A pytest plugin: keeps the tests of chosen suites, and a row for each.

    Args:
        chosen: Says of a suite's class and the name of a clause whether to run it.
    """

    def __init__(self, chosen: Callable[[Any, str], bool]) -> None:
        self.chosen = chosen
        self.rows: dict[str, Row] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what is not a test of a chosen suite."""
        kept = [item for item in items if self._is_chosen(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _is_chosen(self, item: pytest.Item) -> bool:
        kind = getattr(item, "cls", None)
        if not isinstance(kind, type) or not issubclass(kind, SuiteBase):
            return False
        return self.chosen(kind, clause_of(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Note the outcome of one phase of one test."""
        report: pytest.TestReport = yield
        row = self.rows.setdefault(item.nodeid, _new_row(item))
        raised = _first_line(str(call.excinfo.value)) if call.excinfo else ""
        if report.failed:
            row.outcome = "failed"
            row.details = report.longreprtext
            row.reason = raised or "it raised without a message"
        elif report.skipped:
            row.outcome = "skipped"
            row.reason = raised
        elif call.when == "call":
            said = [str(value) for key, value in report.user_properties if key == "said"]
            row.reason = "; ".join(said)
        return report


def _new_row(item: pytest.Item) -> Row:
    """Return the row of a test before it has run."""
    suite: Any = item.cls  # type: ignore[attr-defined]
    clause = clause_of(item)
    told = getattr(getattr(item, "function", None), "__doc__", None) or clause
    return Row(suite.__name__, clause, told.strip().splitlines()[0])


def clause_of(item: pytest.Item) -> str:
    """Return the clause that a test proves; of an author's own test, its name in words."""
    name = item.name.removeprefix("test_").replace("_", " ")
    return getattr(getattr(item, "function", None), "clause", name)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
