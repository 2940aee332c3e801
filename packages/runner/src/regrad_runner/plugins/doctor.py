"""`regrad plugins doctor`: what is wrong with an installation, and how to mend it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import regrad
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from regrad import distributions
from regrad.distributions import Installed
from regrad.registry import GROUPS, Entry
from regrad.text import printable
from rich.markup import escape
from rich.table import Table

from regrad_runner.plugins.doctor_imports import DEVICE, LIBRARIES
from regrad_runner.terminal import Terminal
from regrad_runner.tracking.mlflow import HOST_TAG

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
    versions = {one.normal_name: one.version for one in distributions.installed()}
    findings = [*_damaged(), *_offers(entries), *_requirements(entries, versions)]
    findings += _modules(entries)
    wanted = [name for name, entry in entries.items() if not entry.refused]
    seen = imports(wanted)
    findings.append(_library_builds(seen.pop(LIBRARIES), versions))
    findings.append(_device(seen.pop(DEVICE), gpu=gpu))
    findings += [_imported(entries[name], line) for name, line in seen.items()]
    return [*findings, *_databases(folder), _stale_store(folder)]


def _damaged() -> Iterator[Finding]:
    """Say which distributions, of whomever, have damaged metadata."""
    for one in distributions.broken():
        name = re.split(r"-\d|\.dist-info$|\.egg-info$", one.name)[0].lstrip("~")
        said = f"{one.problem}: {one.folder}"
        yield Finding(f"distribution {name}", ok=False, said=said, mend=_anew(name, one.folder))
    for name, several in distributions.doubled().items():
        versions = " and ".join(sorted(one.version for one in several))
        said = f"is there twice, as {versions}: an upgrade has not come to its end"
        folders = " ".join(shlex.quote(one.folder) for one in several)
        mend = f"remove {folders}, then pip install --force-reinstall {shlex.quote(name)}"
        yield Finding(f"distribution {name}", ok=False, said=said, mend=mend)
    for whole in distributions.installed():
        if not distributions.NAME.fullmatch(whole.name):
            said = f"its METADATA call it so, which is no name: {whole.folder}"
            mend = _anew(whole.name, whole.folder)
            yield Finding(f"distribution {whole.name!r}", ok=False, said=said, mend=mend)
    for plugin in distributions.plugins():
        if not _is_version(plugin.version):
            said = f"its METADATA give it the version {plugin.version!r}: {plugin.folder}"
            mend = _anew(plugin.name, plugin.folder)
            yield Finding(f"distribution {plugin.name}", ok=False, said=said, mend=mend)


def _anew(name: str, folder: str) -> str:
    """Say how to install a distribution anew whose metadata no installer can read."""
    remove = f"remove {shlex.quote(folder)}"
    if not distributions.NAME.fullmatch(name):
        return f"{remove}, then install what it belongs to"
    return f"{remove}, then pip install --force-reinstall {name}"


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _offers(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """Say which names are refused before anything is imported."""
    for entry in entries.values():
        if entry.refused:
            reason, _, mend = entry.refused.partition("; ")
            yield Finding(f"plugin {entry.name}", ok=False, said=reason, mend=mend)


def _requirements(entries: Mapping[str, Entry], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Compare what the plugins' distributions need with what is installed."""
    owners = {(e.distribution, e.version) for e in entries.values() if not e.refused}
    wrong = False
    for name, version in sorted(owners):
        found = distributions.find(name, version)
        for line in found.requires if found else []:
            finding = _requirement(name, line, versions)
            if finding is not None:
                wrong = True
                yield finding
    if not wrong:
        yield Finding("requirements", ok=True, said=f"those of {len(owners)} distributions are met")


def _requirement(name: str, line: str, versions: Mapping[str, str]) -> Finding | None:
    """Judge one requirement of a distribution; None where it is met."""
    check = f"distribution {name}"
    try:
        needed = Requirement(line)
        unmet = _is_unmet(needed, versions)
    except ValueError:  # of every kind that the library has for what it cannot read
        said, mend = f"needs {line!r}, which is no requirement", f"ask the author of {name}"
        return Finding(check, ok=False, said=said, mend=mend)
    if not unmet:
        return None
    there = versions.get(canonicalize_name(needed.name)) or "none"
    wanted = f"{needed.name}{needed.specifier}"
    said = f"needs {wanted}, but {there} is installed"
    mend = f"pip install {shlex.quote(wanted)}, or another version of {name}"
    return Finding(check, ok=False, said=said, mend=mend)


def _is_unmet(needed: Requirement, versions: Mapping[str, str]) -> bool:
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return False
    version = versions.get(canonicalize_name(needed.name))
    return version is None or not needed.specifier.contains(version, prereleases=True)


def _modules(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """Say which plugins' modules several distributions install over each other."""
    places = (entry.value.partition(":")[0] for entry in entries.values())
    owners: dict[str, set[str]] = {place.partition(".")[0]: set() for place in places if place}
    for one in distributions.installed():
        for module in owners.keys() & _top_modules(one):
            owners[module].add(one.name)
    for module, names in sorted(owners.items()):
        if len(names) > 1:
            said = f"{' and '.join(sorted(names))} both install it"
            mend = "uninstall both, then install the one you want"
            yield Finding(f"module {module}", ok=False, said=said, mend=mend)


def _top_modules(one: Installed) -> set[str]:
    """Return the names of what a distribution's list of files puts on Python's path."""
    files = one.read("RECORD").splitlines()
    tops = {line.partition(",")[0].partition("/")[0] for line in files}
    return {top.removesuffix(".py") for top in tops}


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
    command = [sys.executable, "-m", "regrad_runner.plugins.doctor_imports", *wanted]
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


def _library_builds(line: Mapping[str, Any], installed: Mapping[str, str]) -> Finding:
    """Judge whether torch and torchvision belong together."""
    there = (f"{name} {installed.get(name)}" for name in ("torch", "torchvision"))
    versions = " and ".join(there)
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
        upgrade = f"pip install --upgrade {shlex.quote(entry.distribution)}"
        mend = f"{upgrade}, or leave it out: REGRAD_DISABLE={shlex.quote(entry.name)}"
        return Finding(check, ok=False, said=f"{source}: {line['problem']}", mend=mend)
    said = f"{source}: imports in {line['seconds']:.1f} s"
    if line["seconds"] > SLOW:
        module = entry.value.partition(":")[0]
        return Finding(
            check,
            ok=False,
            said=said,
            mend=f"see why: {Path(sys.executable).name} -X importtime -c {shlex.quote(f'import {module}')}",
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
    console = Terminal(soft_wrap=as_json)
    wrong = [finding for finding in findings if not finding.ok]
    if as_json:
        rows = [asdict(finding) for finding in findings]
        console.out(json.dumps(rows, indent=2), highlight=False)
        return int(bool(wrong))
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        if finding.ok:
            table.add_row("ok", *map(_cell, (finding.check, finding.said)))
    console.print(table)
    for finding in wrong:
        said = f"{_cell(finding.check)}: {_cell(finding.said)}"
        console.print(f"\n[bold red]wrong[/]  {said}", highlight=False)
        console.print(f"       mend: {_cell(finding.mend)}", highlight=False)
    console.print(f"\n{len(wrong)} of {len(findings)} looks found something wrong", highlight=False)
    return int(bool(wrong))


def _cell(text: str) -> str:
    """Return text that is shown as it is: no markup, nothing that a terminal obeys."""
    return escape(printable(text))
