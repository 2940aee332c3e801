"""Check what is installed: find its suite, run it, report clause by clause."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import regrad
from regrad import distributions
from regrad.registry import Entry

from regrad_testing.corrections import CorrectionSuite
from regrad_testing.optimizers import OptimizerSuite
from regrad_testing.reporting import Recorder, Row

GROUPS = {"correction": "regrad", "optimizer": "regrad.optimizers"}
SUITES = Path("tests", "test_conformance.py")
ENDED = (
    pytest.ExitCode.OK,
    pytest.ExitCode.TESTS_FAILED,
    pytest.ExitCode.NO_TESTS_COLLECTED,
)


def check(spec: str, suite: Path | None = None) -> dict[str, Any]:
    """Check everything that can be checked about an installed correction or optimizer.

    Its own suite is used if one is found: in `suite`, or in tests/test_conformance.py of the source
    tree of an editable install. Otherwise, and if options are given, the kit's generic suite runs,
    which has no reference.

    Args:
        spec: Its name, with options as for `regrad.create` if they differ from those of the suite.
        suite: A file with suites.

    Returns:
        "name", "kind", "distribution", "version", "suite" (the file, or "generic")
        and "clauses", a list of `Row` as dicts.

    Raises:
        ValueError: If nothing of that name is installed, or `suite` holds none for it.
        PluginLoadError: If it cannot be imported.
        RuntimeError: If a suite's file cannot be imported.
    """
    name = spec.partition(":")[0].strip()
    kind = "optimizer" if name in regrad.available(GROUPS["optimizer"]) else "correction"
    loaded = regrad.load(name, GROUPS[kind])
    entry = regrad.available(GROUPS[kind])[name]
    told = {
        "name": name,
        "kind": kind,
        "distribution": entry.distribution,
        "version": entry.version,
    }
    file = suite
    if file is None and ":" not in spec:
        file = own_suite(entry)
    rows = []
    if file is not None:
        rows = run_suites(file, lambda cls, _: is_suite_of(cls, name, loaded))
    if suite and not rows:
        raise ValueError(f"suite must hold a suite for {name!r}, got '{suite}', which has none")
    used = str(file)
    if not rows:
        used = "generic"
        rows = _run_generic_suite(spec, kind)
    return {**told, "suite": used, "clauses": [asdict(row) for row in rows]}


def _run_generic_suite(spec: str, kind: str) -> list[Row]:
    """Run the kit's own suite on a correction or an optimizer."""
    wanted = "TestInstalledOptimizer" if kind == "optimizer" else "TestInstalledCorrection"
    os.environ["REGRAD_TESTING_SPEC"] = spec  # read by the file, here and in worker processes
    file = Path(__file__).with_name("generic.py")
    return run_suites(file, lambda cls, _: cls.__name__ == wanted)


def own_suite(entry: Entry) -> Path | None:
    """Return the file with suites in the source tree of an editable install, or None."""
    found = distributions.find(entry.distribution, entry.version)
    try:
        told = json.loads(found.read("direct_url.json") if found else "{}")
        editable = told.get("dir_info", {}).get("editable")
        url = str(told.get("url"))
    except (ValueError, AttributeError):  # no JSON, or of another form: it names no source tree
        return None
    if not editable:
        return None
    file = Path(url2pathname(urlparse(url).path)) / SUITES
    return file if file.is_file() else None


def is_suite_of(cls: Any, name: str, loaded: Any) -> bool:
    """Say whether a suite is about the correction or optimizer of this name."""
    if issubclass(cls, OptimizerSuite):
        return loaded is cls.optimizer
    if not issubclass(cls, CorrectionSuite):
        return False
    given = inspect.getattr_static(cls, "correction", None)
    if isinstance(given, str):
        return given.partition(":")[0].strip() == name
    return getattr(given, "name", None) == name or [c.name for c in cls.make()] == [name]


def run_suites(path: Path, chosen: Callable[[Any, str], bool]) -> list[Row]:
    """Run the chosen suites of a file with pytest, apart from any configuration around it.

    Args:
        path: A test file.
        chosen: Says of a suite's class and the name of a clause whether to run it.

    Returns:
        One row per test, in the order of the file.

    Raises:
        RuntimeError: If the file cannot be imported.
    """
    recorder = Recorder(chosen)
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n")
        words = ["-q", "--rootdir", folder, "-c", str(settings)]
        words += ["-p", "no:cacheprovider", "--import-mode=importlib", str(path.resolve())]
        with contextlib.redirect_stdout(printed):
            code = pytest.main(words, plugins=[recorder])
    if code not in ENDED:
        raise RuntimeError(f"suite '{path}' could not be run:\n{printed.getvalue()}")
    return list(recorder.rows.values())
