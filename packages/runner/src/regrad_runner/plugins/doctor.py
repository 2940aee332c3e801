"""`regrad plugins doctor`: what is wrong with an installation, and how to fix it."""

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

from regrad_runner.plugins.doctor_imports import DEVICE, LIBRARY_BUILDS
from regrad_runner.terminal import Terminal, plain_table
from regrad_runner.tracking.mlflow import HOST_TAG

SLOW = 5.0  # seconds to import one plugin, torch not counted, the faster of two times
PATIENCE = 300.0  # seconds for one process that imports plugins
HOSTS = "SELECT DISTINCT value FROM tags WHERE key = ? AND value <> ''"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked.
        ok: Whether it is right.
        said: What was found.
        mend: How to fix it; empty if nothing is wrong.
    """

    check: str
    ok: bool
    said: str
    mend: str = ""


def examine(folder: Path, *, gpu: bool = False) -> list[Finding]:
    """Check everything that is known to go wrong.

    Args:
        folder: Where runs were or will be written.
        gpu: Whether a GPU is expected; `CUDA_VISIBLE_DEVICES` with a device in it says so too.

    Returns:
        What was found, good or bad.
    """
    entries = _entries()
    versions = {one.normal_name: one.version for one in distributions.installed()}
    findings = [*_damaged(), *_offers(entries), *_requirements(entries, versions)]
    findings += _modules(entries)
    wanted = [name for name, entry in entries.items() if not entry.refused]
    seen = imports(wanted)
    findings.append(_library_builds(seen.pop(LIBRARY_BUILDS), versions))
    findings.append(_device(seen.pop(DEVICE), gpu=gpu))
    findings += [_imported(entries[name], line) for name, line in seen.items()]
    findings += _databases(folder)
    findings.append(_stale_store(folder))
    return findings


def _entries() -> dict[str, Entry]:
    """Return every plugin by "GROUP/NAME"."""
    entries = {}
    for group in GROUPS.values():
        for entry in regrad.available(group).values():
            entries[f"{group}/{entry.name}"] = entry
    return entries


def _damaged() -> Iterator[Finding]:
    """Say which distributions, whoever made them, have damaged metadata."""
    yield from _unreadable()
    yield from _doubled()
    for named in distributions.installed():
        if not distributions.NAME.fullmatch(named.name):
            said = f"its METADATA gives this name, which is not valid: {named.folder}"
            mend = _reinstall(named.name, named.folder)
            yield Finding(f"distribution {named.name!r}", ok=False, said=said, mend=mend)
    for plugin in distributions.plugins():
        if not _is_version(plugin.version):
            said = f"its METADATA gives the version {plugin.version!r}: {plugin.folder}"
            mend = _reinstall(plugin.name, plugin.folder)
            yield Finding(f"distribution {plugin.name}", ok=False, said=said, mend=mend)


def _unreadable() -> Iterator[Finding]:
    """Say which distributions have metadata that cannot be read."""
    for one in distributions.broken():
        name = re.split(r"-\d|\.dist-info$|\.egg-info$", one.name)[0].lstrip("~")
        said = f"{one.problem}: {one.folder}"
        mend = _reinstall(name, one.folder)
        yield Finding(f"distribution {name}", ok=False, said=said, mend=mend)


def _doubled() -> Iterator[Finding]:
    """Say which distributions are installed twice."""
    for name, several in distributions.doubled().items():
        versions = " and ".join(sorted(one.version for one in several))
        said = f"is installed twice, as {versions}: an upgrade did not finish"
        folders = " ".join(shlex.quote(one.folder) for one in several)
        mend = f"remove {folders}, then pip install --force-reinstall {shlex.quote(name)}"
        yield Finding(f"distribution {name}", ok=False, said=said, mend=mend)


def _reinstall(name: str, folder: str) -> str:
    """Say how to reinstall a distribution whose metadata no installer can read."""
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
    accepted = [entry for entry in entries.values() if not entry.refused]
    owners = {(entry.distribution, entry.version) for entry in accepted}
    all_met = True
    for name, version in sorted(owners):
        found = distributions.find(name, version)
        if found is None:
            continue
        for line in found.requires:
            finding = _requirement(name, line, versions)
            if finding is not None:
                all_met = False
                yield finding
    if all_met:
        yield Finding("requirements", ok=True, said=f"those of {len(owners)} distributions are met")


def _requirement(name: str, line: str, versions: Mapping[str, str]) -> Finding | None:
    """Judge one requirement of a distribution; None if it is met."""
    check = f"distribution {name}"
    try:
        needed = Requirement(line)
        unmet = _is_unmet(needed, versions)
    except ValueError:  # every error of the library for what it cannot read is one
        said = f"needs {line!r}, which is not a valid requirement"
        return Finding(check, ok=False, said=said, mend=f"ask the author of {name}")
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
    owners: dict[str, set[str]] = {}
    for entry in entries.values():
        module = re.split(r"[.:]", entry.value)[0]
        if module:
            owners[module] = set()
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
        lines, ending = _run([name for name in wanted if name not in seen])
        last_started = LIBRARY_BUILDS
        for line in lines:
            if "name" in line:
                seen.setdefault(line["name"], line)
            if "starts" in line:
                last_started = line["starts"]
        if last_started not in seen:
            seen[last_started] = _failed_import(ending)
        if LIBRARY_BUILDS not in seen or DEVICE not in seen:
            # torch itself ends the process: nothing else can be tried
            for name in (LIBRARY_BUILDS, DEVICE, *wanted):
                seen.setdefault(name, _failed_import("torch could not be imported"))
    _measure_slow_again(seen, wanted)
    return seen


def _failed_import(problem: str) -> dict[str, Any]:
    return {"seconds": 0.0, "problem": problem, "found": None}


def _measure_slow_again(seen: dict[str, dict[str, Any]], wanted: list[str]) -> None:
    """Import slow plugins again and keep the faster time: at first, files are read and compiled.

    Args:
        seen: What came of each import. Overwritten.
        wanted: "GROUP/NAME" of each plugin.
    """
    slow = [name for name in wanted if seen[name]["seconds"] > SLOW]
    if not slow:
        return
    lines, _ = _run(slow)
    for line in lines:
        if line.get("name") in slow:
            first = seen[line["name"]]
            first["seconds"] = min(first["seconds"], line["seconds"])


def _run(wanted: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of one process, and in words how it ended."""
    command = [sys.executable, "-m", "regrad_runner.plugins.doctor_imports", *wanted]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or ""
        if isinstance(printed, bytes):
            printed = printed.decode()
        return _lines_of(printed), f"importing it takes more than {PATIENCE:g} s"
    ending = f"importing it ends the process with exit code {done.returncode}"
    return _lines_of(done.stdout), ending


def _lines_of(printed: str) -> list[dict[str, Any]]:
    """Return the lines of `doctor_imports` among whatever the plugins printed."""
    ours = ('{"starts": ', '{"name": ')
    return [json.loads(line) for line in printed.splitlines() if line.startswith(ours)]


def _library_builds(line: Mapping[str, Any], installed: Mapping[str, str]) -> Finding:
    """Judge whether torch and torchvision belong together."""
    torch_version = f"torch {installed.get('torch')}"
    versions = f"{torch_version} and torchvision {installed.get('torchvision')}"
    mend = "install both in one command: uv pip install --reinstall torch torchvision"
    if line["problem"]:
        said = f"{versions} do not work together: {line['problem']}"
        return Finding(LIBRARY_BUILDS, ok=False, said=said, mend=mend)
    builds = line["found"]
    if builds["torch"] != builds["torchvision"]:
        said = f"{versions} are built for {builds['torch']} and {builds['torchvision']}"
        return Finding(LIBRARY_BUILDS, ok=False, said=said, mend=mend)
    return Finding(LIBRARY_BUILDS, ok=True, said=f"{versions}, built for {builds['torch']}")


def _device(line: Mapping[str, Any], *, gpu: bool) -> Finding:
    """Judge whether the device that is expected is there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    is_expected = gpu or visible not in ("", "-1")
    found = line["found"] or {"kind": "cpu", "count": 0, "reasons": [line["problem"]]}
    if found["count"]:
        return Finding(DEVICE, ok=True, said=f"{found['count']} {found['kind']}")
    if not is_expected:
        return Finding(DEVICE, ok=True, said="no GPU")
    why = "; ".join(found["reasons"]) or f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return Finding(
        DEVICE,
        ok=False,
        said=f"a GPU was requested, but torch finds none: {why}",
        mend="check nvidia-smi, CUDA_VISIBLE_DEVICES, "
        "and that torch's CUDA is not newer than the driver",
    )


def _imported(entry: Entry, line: Mapping[str, Any]) -> Finding:
    """Judge the import of one plugin."""
    check = f"plugin {entry.name}"
    source = f"{entry.distribution} {entry.version}"
    if line["problem"]:
        upgrade = f"pip install --upgrade {shlex.quote(entry.distribution)}"
        mend = f"{upgrade}, or leave it out: REGRAD_DISABLE={shlex.quote(entry.name)}"
        return Finding(check, ok=False, said=f"{source}: {line['problem']}", mend=mend)
    said = f"{source}: imports in {line['seconds']:.1f} s"
    if line["seconds"] <= SLOW:
        return Finding(check, ok=True, said=said)
    module = entry.value.partition(":")[0]
    code = shlex.quote(f"import {module}")
    mend = f"see why: {Path(sys.executable).name} -X importtime -c {code}"
    return Finding(check, ok=False, said=said, mend=mend)


def _databases(folder: Path) -> Iterator[Finding]:
    """Say which SQLite files several hosts have written: their locks do not hold between hosts."""
    for path in sorted({*folder.glob("mlflow.db"), *folder.glob("*/mlflow.db")}):
        check = f"database {path}"
        hosts = _hosts(path)
        if len(hosts) <= 1:
            writer = hosts[0] if hosts else "no run yet"
            yield Finding(check, ok=True, said=f"written by {writer}")
            continue
        said = f"{', '.join(hosts)} have written it, and SQLite's locks do not work across hosts"
        server = f"mlflow server --backend-store-uri sqlite:///{path.resolve()}"
        mend = f"run one server, {server}, and give --tracking-uri"
        yield Finding(check, ok=False, said=said, mend=mend)


def _hosts(path: Path) -> list[str]:
    """Return the hosts whose runs are in a database; none if it cannot be read."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return sorted(str(row[0]) for row in database.execute(HOSTS, (HOST_TAG,)))
    except sqlite3.Error:
        return []


def _stale_store(folder: Path) -> Finding:
    """Say whether something logged to MLflow's default place."""
    check = "./mlruns"
    path = folder / "mlruns"
    if not path.is_dir():
        return Finding(check, ok=True, said="is not there")
    said = f"{path} was written by something without a tracking URI: regrad never writes there"
    mend = f"look at it, then remove it: mlflow ui --backend-store-uri {path}"
    return Finding(check, ok=False, said=said, mend=mend)


def show_findings(findings: list[Finding], *, as_json: bool = False) -> int:
    """Print what was found; return 1 if anything is wrong.

    Args:
        findings: As `examine` returned them.
        as_json: For programs; else a table for people, with problems and their fixes at the end.
    """
    console = Terminal(soft_wrap=as_json)
    wrong = [finding for finding in findings if not finding.ok]
    if as_json:
        rows = [asdict(finding) for finding in findings]
        console.out(json.dumps(rows, indent=2), highlight=False)
        return int(bool(wrong))
    fine = [("ok", finding.check, finding.said) for finding in findings if finding.ok]
    console.print(plain_table((), fine))
    for finding in wrong:
        said = f"{_cell(finding.check)}: {_cell(finding.said)}"
        console.print(f"\n[bold red]wrong[/]  {said}", highlight=False)
        console.print(f"       fix: {_cell(finding.mend)}", highlight=False)
    problems = f"{len(wrong)} problems" if len(wrong) > 1 else "1 problem"
    summary = problems if wrong else "no problems"
    console.print(f"\n{len(findings)} checks, {summary}", highlight=False)
    return int(bool(wrong))


def _cell(text: str) -> str:
    """Return text to show as it is: without markup and control characters."""
    return escape(printable(text))
