"""`regrad plugins doctor`: what is wrong with an installation, and how to mend it."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import regrad
from packaging.requirements import Requirement
from regrad.registry import Entry
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regrad_runner.delivery import HOST_TAG
from regrad_runner.doctor_imports import DEVICE, LIBRARIES
from regrad_runner.plugins import GROUPS

SLOW = 5.0  # seconds to import one plugin, torch not counted, the faster of two times
PATIENCE = 300.0  # seconds for one process that imports plugins
HOSTS = "SELECT DISTINCT value FROM tags WHERE key = ? AND value <> ''"


@dataclass(frozen=True)
class Finding:
    """What one look came to.

    Attributes:
        check: What was looked at.
        ok: Whether it is as it should be.
        said: What was found.
        mend: What to do; empty where nothing is wrong.
    """

    check: str
    ok: bool
    said: str
    mend: str = ""


def examine(folder: Path, *, gpu: bool = False) -> list[Finding]:
    """Look at everything that is known to go wrong.

    Args:
        folder: Where runs were or will be written.
        gpu: Whether a GPU is expected; `CUDA_VISIBLE_DEVICES` with a device in it says so too.

    Returns:
        What was found, the good too.
    """
    entries = {
        f"{group}/{e.name}": e
        for group in GROUPS.values()
        for e in regrad.available(group).values()
    }
    findings = [*_offers(entries), *_requirements(entries), *_modules(entries)]
    wanted = [name for name, entry in entries.items() if not entry.refused]
    seen = imports(wanted)
    findings += [_library_builds(seen.pop(LIBRARIES)), _device(seen.pop(DEVICE), gpu=gpu)]
    findings += [_imported(entries[name], line) for name, line in seen.items()]
    return [*findings, *_databases(folder), _stale_store(folder)]


def _offers(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """Say which names are refused before anything is imported."""
    for entry in entries.values():
        if entry.refused:
            reason, _, mend = entry.refused.partition("; ")
            yield Finding(f"plugin {entry.name}", ok=False, said=reason, mend=mend)


def _requirements(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """Compare what the plugins' distributions need with what is installed."""
    distributions = sorted({entry.distribution for entry in entries.values() if not entry.refused})
    unmet = [
        (name, r)
        for name in distributions
        for r in metadata.requires(name) or []
        if _is_unmet(Requirement(r))
    ]
    for name, text in unmet:
        needed = Requirement(text)
        said = f"needs {needed.name}{needed.specifier}, but {_version(needed.name) or 'none'} is installed"
        command = f"pip install {shlex.quote(f'{needed.name}{needed.specifier}')}, or another version of {name}"
        yield Finding(f"distribution {name}", ok=False, said=said, mend=command)
    if not unmet:
        yield Finding(
            "requirements", ok=True, said=f"those of {len(distributions)} distributions are met"
        )


def _is_unmet(needed: Requirement) -> bool:
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return False
    version = _version(needed.name)
    return version is None or not needed.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _modules(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """Say which plugins' modules several distributions install over each other."""
    owners = metadata.packages_distributions()
    for module in sorted(
        {entry.value.partition(":")[0].partition(".")[0] for entry in entries.values()} - {""}
    ):
        several = sorted(set(owners.get(module, [])))
        if len(several) > 1:
            said = f"{' and '.join(several)} both install it"
            yield Finding(
                f"module {module}",
                ok=False,
                said=said,
                mend="uninstall both, then install the one you want",
            )


def imports(wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Import plugins in processes of their own: one that ends its process does not hide the others.

    Args:
        wanted: "GROUP/NAME" of each.

    Returns:
        By name, torch's libraries and the device among them: `seconds`, `problem` (empty
        where there is none) and `found`.
    """
    seen: dict[str, dict[str, Any]] = {}
    while len(seen) < len(wanted) + 2:
        rest = [name for name in wanted if name not in seen]
        lines, ending = _run(rest)
        seen |= {
            line["name"]: line for line in lines if "name" in line and line["name"] not in seen
        }
        started = [line["starts"] for line in lines if "starts" in line] or [LIBRARIES]
        for name in {started[-1]} - seen.keys():
            seen[name] = {"seconds": 0.0, "problem": ending, "found": None}
        if (
            LIBRARIES not in seen or DEVICE not in seen
        ):  # torch itself ends the process: nothing else can be tried
            lost = {"seconds": 0.0, "problem": "torch could not be imported", "found": None}
            seen |= {name: dict(lost) for name in (LIBRARIES, DEVICE, *wanted) if name not in seen}
    slow = [name for name in wanted if seen[name]["seconds"] > SLOW]
    for line in _run(slow)[0] if slow else ():  # the first time, files were read and compiled
        if line.get("name") in slow:
            seen[line["name"]]["seconds"] = min(seen[line["name"]]["seconds"], line["seconds"])
    return seen


def _run(wanted: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of one process, and in words how it ended."""
    command = [sys.executable, "-m", "regrad_runner.doctor_imports", *wanted]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        printed, ending = (
            done.stdout,
            f"importing it ends the process with exit code {done.returncode}",
        )
    except subprocess.TimeoutExpired as stopped:
        printed = (
            stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        )
        ending = f"importing it takes more than {PATIENCE:g} s"
    lines = [line for line in printed.splitlines() if line.startswith(('{"starts": ', '{"name": '))]
    return [json.loads(line) for line in lines], ending


def _library_builds(line: Mapping[str, Any]) -> Finding:
    """Judge whether torch and torchvision belong together."""
    versions = f"torch {_version('torch')} and torchvision {_version('torchvision')}"
    mend = "install both in one command: uv pip install --reinstall torch torchvision"
    if line["problem"]:
        return Finding(
            LIBRARIES,
            ok=False,
            said=f"{versions} do not work together: {line['problem']}",
            mend=mend,
        )
    builds = line["found"]
    if builds["torch"] != builds["torchvision"]:
        said = f"{versions} are built for {builds['torch']} and {builds['torchvision']}"
        return Finding(LIBRARIES, ok=False, said=said, mend=mend)
    return Finding(LIBRARIES, ok=True, said=f"{versions}, built for {builds['torch']}")


def _device(line: Mapping[str, Any], *, gpu: bool) -> Finding:
    """Judge whether the device that is expected is there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    expected = gpu or visible not in ("", "-1")
    found = line["found"] or {"kind": "cpu", "count": 0, "reasons": [line["problem"]]}
    if found["count"] or not expected:
        return Finding(
            DEVICE,
            ok=True,
            said=f"{found['count'] or 'no'} {found['kind'] if found['count'] else 'GPU'}",
        )
    why = "; ".join(found["reasons"]) or f"CUDA_VISIBLE_DEVICES is {visible!r}"
    mend = (
        "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that torch's CUDA is not newer than the driver"
    )
    return Finding(
        DEVICE, ok=False, said=f"a GPU is asked for, and torch finds none: {why}", mend=mend
    )


def _imported(entry: Entry, line: Mapping[str, Any]) -> Finding:
    """Judge the import of one plugin."""
    check, source = f"plugin {entry.name}", f"{entry.distribution} {entry.version}"
    if line["problem"]:
        mend = f"pip install --upgrade {entry.distribution}, or leave it out: REGRAD_DISABLE={entry.name}"
        return Finding(check, ok=False, said=f"{source}: {line['problem']}", mend=mend)
    said = f"{source}: imports in {line['seconds']:.1f} s"
    if line["seconds"] > SLOW:
        module = entry.value.partition(":")[0]
        return Finding(
            check,
            ok=False,
            said=said,
            mend=f"see why: {Path(sys.executable).name} -X importtime -c 'import {module}'",
        )
    return Finding(check, ok=True, said=said)


def _databases(folder: Path) -> Iterator[Finding]:
    """Say which SQLite files several hosts have written: their locks do not hold between hosts."""
    for path in sorted({*folder.glob("mlflow.db"), *folder.glob("*/mlflow.db")}):
        hosts = _hosts(path)
        if len(hosts) > 1:
            said = (
                f"{', '.join(hosts)} have written it, and SQLite's locks do not hold between hosts"
            )
            server = f"mlflow server --backend-store-uri sqlite:///{path.resolve()}"
            mend = f"run one server, {server}, and give --tracking-uri"
            yield Finding(f"database {path}", ok=False, said=said, mend=mend)
        else:
            yield Finding(
                f"database {path}",
                ok=True,
                said=f"written by {hosts[0] if hosts else 'no run yet'}",
            )


def _hosts(path: Path) -> list[str]:
    """Return the hosts whose runs are in a database; none where it cannot be read."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return sorted(str(row[0]) for row in database.execute(HOSTS, (HOST_TAG,)))
    except sqlite3.Error:
        return []


def _stale_store(folder: Path) -> Finding:
    """Say whether something logged to MLflow's default place."""
    path = folder / "mlruns"
    if not path.is_dir():
        return Finding("./mlruns", ok=True, said="is not there")
    said = f"{path} was written by something without a tracking URI: regrad never writes there"
    return Finding(
        "./mlruns",
        ok=False,
        said=said,
        mend=f"look, then remove it: mlflow ui --backend-store-uri {path}",
    )


def show_findings(findings: list[Finding], *, as_json: bool = False) -> int:
    """Print what was found; return 1 if anything is wrong.

    Args:
        findings: As `examine` returned them.
        as_json: For programs; else a table for people, what is wrong at its end with the mend.
    """
    console, wrong = Console(soft_wrap=as_json), [finding for finding in findings if not finding.ok]
    if as_json:
        console.out(
            json.dumps([asdict(finding) for finding in findings], indent=2), highlight=False
        )
        return int(bool(wrong))
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in [finding for finding in findings if finding.ok]:
        table.add_row("ok", escape(finding.check), escape(finding.said))
    console.print(table)
    for finding in wrong:
        console.print(
            f"\n[bold red]wrong[/]  {escape(finding.check)}: {escape(finding.said)}",
            highlight=False,
        )
        console.print(f"       mend: {finding.mend}", markup=False, highlight=False)
    console.print(f"\n{len(wrong)} of {len(findings)} looks found something wrong", highlight=False)
    return int(bool(wrong))
