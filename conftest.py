"""What every member's tests share."""

import gc
import os

import pytest
from hypothesis import settings

# A timed assertion fails on a busy machine: tests judge numbers, benchmarks judge time.
settings.register_profile("regrad", deadline=None)
settings.load_profile("regrad")

# A comparison that does not say how many runs it has at once has one: worker processes take
# seconds to start, and do not see what a test put in the place of a function.
os.environ["LOKY_MAX_CPU_COUNT"] = "1"

# Nothing that is imported to collect tests is garbage; looking for some takes seconds.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files whose tests may take longest, so that no process ends with one of them.

    The limit of a test, `pytest.mark.timeout`, tells how long it may take.
    """
    longest: dict[object, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limit = float(mark.args[0]) if mark is not None and mark.args else 0.0
        longest[item.path] = max(limit, longest.get(item.path, 0.0))
    items.sort(key=lambda item: -longest[item.path])


def pytest_collection_finish() -> None:
    """Leave what was imported out of every garbage collection to come.

    Every worker imports every member to collect its tests, and with them MLflow,
    transformers and Lightning. Passing over their objects took longer than most
    tests; so did looking for pipeline stages among them, as `regrad.attach` does.
    """
    gc.enable()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter take down what was imported, as libraries expect it to."""
    gc.unfreeze()
