"""Check what was built for the index: one wheel and one source distribution per member.

Usage: python release/check.py FOLDER [--tag TAG]
With --tag also what a release must say: the version that the tag names, dated changelogs, and
no link that leads nowhere on the index.
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from addresses import dead_links
from members import ROOT, Member, read_members
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

FILES_OF_A_SOURCE = ("CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml")
UPPER_ENDS = {"<", "<=", "~=", "=="}
MADE_BY_PYTHON = "__pycache__"
ENTRY = re.compile(
    r"## (?P<version>\d+\.\d+\.\d+\S*) \((?P<date>unreleased|\d{4}-\d\d-\d\d)\)|## Unreleased"
)


def problems(folder: Path, members: list[Member], tag: str | None = None) -> Iterator[str]:
    """Yield what is wrong with what was built.

    Args:
        folder: Where the files lie.
        members: Whose files they must be.
        tag: The tag that is released, if it is; such as "v0.1.0".
    """
    yield from other_files(folder, members)
    yield from disagreements(members)
    for member in members:
        found = [*problems_of_changelog(member, is_release=tag is not None)]
        if (folder / member.wheel).is_file():
            found += problems_of_wheel(member, folder / member.wheel)
        if (folder / member.source).is_file():
            found += problems_of_source(member, folder / member.source)
        if tag is not None:
            found += problems_of_release(member, tag)
        yield from (f"{member.name}: {problem}" for problem in found)


def other_files(folder: Path, members: list[Member]) -> Iterator[str]:
    """Yield which files are missing, and which are there and should not be."""
    expected: set[str] = set()
    for member in members:
        expected |= {member.wheel, member.source}
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} belongs to no member" for name in sorted(found - expected))


def disagreements(members: list[Member]) -> Iterator[str]:
    """Yield where versions, or what one member needs of another, do not fit together."""
    versions = {member.name: member.version for member in members}
    if len(set(versions.values())) > 1:
        said = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        yield f"members must have one version, got {said}"
    for member in members:
        for requirement in requirements_of(member):
            version = versions.get(canonicalize_name(requirement.name))
            if version is not None:
                yield from _problems_of_range(member.name, requirement, version)


def requirements_of(member: Member) -> list[Requirement]:
    """Return what a member needs, extras included."""
    lines = list(member.project.get("dependencies", []))
    for extra in member.project.get("optional-dependencies", {}).values():
        lines += extra
    return [Requirement(line) for line in lines]


def _problems_of_range(name: str, requirement: Requirement, version: str) -> Iterator[str]:
    """Yield what is wrong with the range of versions in which one member needs another."""
    needed = f"{name} needs {requirement}"
    if not requirement.specifier.contains(version, prereleases=True):
        yield f"{needed}, which leaves out {version}, the version beside it"
    if not _has_upper_end(requirement.specifier):
        yield f"{needed}, which has no upper end"


def _has_upper_end(specifier: SpecifierSet) -> bool:
    """Return whether a range of versions ends."""
    return any(one.operator in UPPER_ENDS for one in specifier)


def problems_of_changelog(member: Member, *, is_release: bool) -> Iterator[str]:
    """Yield what is wrong with a member's changelog.

    Args:
        member: Whose.
        is_release: Whether its newest entry must have a date.
    """
    path = member.path / "CHANGELOG.md"
    if not path.is_file():
        yield "CHANGELOG.md is missing"
        return
    headings = re.findall(r"^## .*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not headings:
        yield "CHANGELOG.md has no entry"
        return
    newest = ENTRY.fullmatch(headings[0])
    if newest is None:
        yield f"CHANGELOG.md must begin with '## {member.version} (date)', got {headings[0]!r}"
        return
    if newest["version"] not in (None, member.version):
        yield f"CHANGELOG.md begins with {newest['version']}, the metadata say {member.version}"
    if is_release and newest["date"] in (None, "unreleased"):
        yield f"CHANGELOG.md must date the entry of {member.version}, got {headings[0]!r}"


def problems_of_release(member: Member, tag: str) -> Iterator[str]:
    """Yield what must not be so once a tag is there."""
    if tag != f"v{member.version}":
        yield f"the tag must be v{member.version}, got {tag!r}"
    readme = (member.path / "README.md").read_text(encoding="utf-8")
    for link in dead_links(readme):
        yield f"README.md links {link!r}, which leads nowhere on the index"
    if not member.project.get("urls"):
        yield "pyproject.toml has no [project.urls]"


def problems_of_wheel(member: Member, path: Path) -> Iterator[str]:
    """Yield what is wrong with a member's wheel."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        information = f"{member.stem}.dist-info"
        yield from problems_of_metadata(member, archive.read(f"{information}/METADATA"))
        yield from _problems_of_licence(
            member, names, f"{information}/licenses/LICENSE", archive.read
        )
    yield from _missing("the wheel", names, files_of_package(member))
    stray = sorted(
        name for name in names if Path(name).parts[0] not in (member.package, information)
    )
    if stray:
        yield f"the wheel would also install {', '.join(stray)}"


def problems_of_source(member: Member, path: Path) -> Iterator[str]:
    """Yield what is wrong with a member's source distribution."""
    with tarfile.open(path) as archive:
        names = {entry.name for entry in archive.getmembers()}

        def read(name: str) -> bytes:
            file = archive.extractfile(name)
            return file.read() if file else b""

        yield from problems_of_metadata(member, read(f"{member.stem}/PKG-INFO"))
        yield from _problems_of_licence(member, names, f"{member.stem}/LICENSE", read)
    files = [*FILES_OF_A_SOURCE, *(f"src/{name}" for name in files_of_package(member))]
    files += _files_below(member.path, member.path / "tests")
    yield from _missing("the source distribution", names, (f"{member.stem}/{n}" for n in files))


def problems_of_metadata(member: Member, metadata: bytes) -> Iterator[str]:
    """Yield where the metadata of a file that was built say something else than the member."""
    try:
        parsed = Metadata.from_email(metadata)
    except ExceptionGroup as wrong:
        yield from (f"metadata are not valid: {problem}" for problem in wrong.exceptions)
        return
    readme = (member.path / "README.md").read_text(encoding="utf-8")
    said = {
        "name": (parsed.name, member.name),
        "version": (str(parsed.version), member.version),
        "summary": (parsed.summary, member.project["description"]),
        "licence": (parsed.license_expression, member.project["license"]),
        "licence files": (parsed.license_files, member.project["license-files"]),
        "type of the README": (parsed.description_content_type, "text/markdown"),
        "Python": (
            str(parsed.requires_python),
            str(SpecifierSet(member.project["requires-python"])),
        ),
    }
    for name, (built, expected) in said.items():
        if built != expected:
            yield f"{name} must be {expected!r}, got {built!r}"
    if (parsed.description or "").strip() != readme.strip():
        yield "the description is not README.md"


def _problems_of_licence(
    member: Member, names: set[str], name: str, read: Callable[[str], bytes]
) -> Iterator[str]:
    """Yield what is wrong with the licence in an archive.

    Args:
        member: Whose archive.
        names: Of the files in it.
        name: Of the licence.
        read: Returns the content of a file in it.
    """
    if name not in names:
        yield f"{name} is missing"
    elif read(name) != (member.path / "LICENSE").read_bytes():
        yield f"{name} is not LICENSE"


def files_of_package(member: Member) -> list[str]:
    """Return what an installed member must hold, as paths from where it is installed."""
    folder = member.path / "src"
    return [f"{member.package}/py.typed", *_files_below(folder, folder / member.package)]


def _files_below(start: Path, folder: Path) -> list[str]:
    """Return the files in a folder, as paths from another one above it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.relative_to(start).as_posix() for path in paths if MADE_BY_PYTHON not in path.parts
    ]


def _missing(archive: str, names: set[str], expected: Iterable[str]) -> Iterator[str]:
    """Yield which files an archive lacks."""
    yield from (f"{archive} lacks {name}" for name in expected if name not in names)


def main(arguments: list[str]) -> int:
    """Print every problem; the exit code is 1 if there is one."""
    parser = argparse.ArgumentParser(description="Check what was built for the index.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag")
    given = parser.parse_args(arguments)
    members = read_members(ROOT)
    found = [*problems(given.folder, members, given.tag)]
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    if not found:
        sys.stdout.write(
            f"{len(members)} members: wheels and source distributions are as they must be\n"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
