"""What installed distributions say about themselves, from metadata alone.

A broken one is set aside, and can be named.
"""

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from importlib import metadata
from typing import Any

POINTS = "entry_points.txt"
NAMELESS = "it has no METADATA, or METADATA without a name"
# Kept from before `hide_broken`, so that what is hidden from others can be named here.
discover = metadata.Distribution.discover
# For the processes that a program starts: they import these before anything can be hidden.
WITHOUT_POINTS = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Installed:
    """A distribution whose metadata can be read.

    Attributes:
        name: As in its metadata: any text, if the metadata is damaged.
        version: Empty if there is none.
        summary: One line; empty if there is none.
        folder: The folder of its metadata.
        source: What `importlib.metadata` found.
    """

    name: str
    version: str
    summary: str
    folder: str
    source: metadata.Distribution

    @property
    def normal_name(self) -> str:
        """The name as every spelling of it is compared."""
        return re.sub(r"[-_.]+", "-", self.name).lower()

    @property
    def requires(self) -> list[str]:
        """The lines of its requirements; none if they cannot be read."""
        try:
            return list(self.source.requires or [])
        except Exception:  # noqa: BLE001 - somebody else's file can be wrong in any way
            return []

    def read(self, file: str) -> str:
        """Return the text of a file beside its metadata; empty if it cannot be read."""
        return _text(self.source, file)


@dataclass(frozen=True)
class Broken:
    """A distribution whose metadata are damaged.

    Attributes:
        name: What its folder calls it.
        folder: The folder of its metadata, if known.
        problem: What is wrong, in words.
        points: The text of its entry points, as far as it can be read.
    """

    name: str
    folder: str
    problem: str
    points: str = ""


def every() -> Iterator[Installed | Broken]:
    """Return what is installed, in the order in which Python finds it, including broken ones."""
    for source in discover():
        yield _read(source)


def installed() -> Iterator[Installed]:
    """Return the readable distributions; of several with one name, the one found first."""
    yield from _first_of_each_name(every())


def plugins() -> Iterator[Installed]:
    """Return the distributions that offer anything to regrad; broken ones are passed over."""
    # The other metadata of all other distributions need not be read.
    sources = (source for source in discover() if "regrad" in _text(source, POINTS))
    yield from _first_of_each_name(_read(source) for source in sources)


def _first_of_each_name(found: Iterable[Installed | Broken]) -> Iterator[Installed]:
    """Yield the readable ones; of several with one name, the first."""
    seen: set[str] = set()
    for one in found:
        if isinstance(one, Installed) and one.normal_name not in seen:
            seen.add(one.normal_name)
            yield one


def offers(group: str) -> Iterator[tuple[Installed, metadata.EntryPoint]]:
    """Return the entry points of a group with the distributions that offer them.

    Args:
        group: Such as "regrad.optimizers".
    """
    for one in plugins():
        for point in one.source.entry_points:
            if point.group == group:
                yield one, point


def find(name: str, version: str) -> Installed | None:
    """Return the distribution of this name and version that offers anything to regrad, or None.

    The name is compared and never looked up: metadata may call themselves "../../..".
    """
    for one in plugins():
        if (one.name, one.version) == (name, version):
            return one
    return None


def version(name: str) -> str:
    """Return the version of an installed distribution; empty if none can be read.

    Args:
        name: Of a distribution that the caller knows, such as "torch".

    Example:
        >>> version("no-such-distribution")
        ''
    """
    for source in discover(name=name):
        one = _read(source)
        if isinstance(one, Installed):
            return one.version
    return ""


def broken() -> list[Broken]:
    """Return the distributions whose metadata are damaged."""
    return [one for one in every() if isinstance(one, Broken)]


def doubled() -> dict[str, list[Installed]]:
    """Return the distributions that are in one folder twice, by name: an interrupted upgrade."""
    groups: dict[tuple[str, str], list[Installed]] = {}
    for one in every():
        if isinstance(one, Installed):
            place = str(one.source.locate_file(""))
            groups.setdefault((place, one.normal_name), []).append(one)
    several: dict[str, list[Installed]] = {}
    for (_, name), found in groups.items():
        if len({one.folder for one in found}) > 1:
            several[name] = found
    return several


def hide_broken() -> None:
    """Hide broken distributions from every library that this process imports after the call.

    For programs, not for libraries: torch, pydantic, pytest and MLflow read the entry points of all
    distributions when they are imported, and one that cannot be read stops them. `broken` still
    returns what is hidden. Where nothing is broken, nothing is changed.
    """
    damaged = broken()
    hidden = {one.folder for one in damaged}
    if not hidden:
        return
    if any(POINTS in one.problem for one in damaged):
        for variable, value in WITHOUT_POINTS.items():
            os.environ.setdefault(variable, value)
    _hide(metadata.Distribution, hidden)
    # The backport of the same module, for libraries that use it.
    with contextlib.suppress(ImportError):
        backport = importlib.import_module("importlib_metadata")
        _hide(backport.Distribution, hidden)


def _hide(kind: Any, hidden: set[str]) -> None:
    """Let a class that finds distributions pass over those in some folders."""
    found_by = kind.discover

    def found(**where: Any) -> Iterator[metadata.Distribution]:
        for source in found_by(**where):
            if _folder(source) not in hidden:
                yield source

    kind.discover = staticmethod(found)


def _folder(source: metadata.Distribution) -> str:
    """Return where a distribution's metadata lie; importlib has no public name for it."""
    return str(getattr(source, "_path", ""))


def _read(source: metadata.Distribution) -> Installed | Broken:
    """Read one distribution."""
    folder = _folder(source)
    points = _text(source, POINTS)
    called = re.split(r"[\\/]", folder)[-1] or "of an unknown place"

    def damaged(problem: str) -> Broken:
        return Broken(called, folder, problem, points)

    try:
        about = _headers(_description(source))
        name = str(about.get("Name") or "")
        version = str(about.get("Version") or "")
        summary = str(about.get("Summary") or "")
    except Exception as cause:  # noqa: BLE001 - somebody else's file can be wrong in any way
        return damaged(f"its METADATA cannot be read ({type(cause).__name__}: {cause})")
    if not name:
        return damaged(NAMELESS)
    try:
        list(source.entry_points)
    except Exception as cause:  # noqa: BLE001 - somebody else's file can be wrong in any way
        return damaged(f"its {POINTS} cannot be read ({type(cause).__name__}: {cause})")
    return Installed(name, version, summary, folder, source)


def _description(source: metadata.Distribution) -> str:
    """Return the text of a distribution's metadata; empty if it has none."""
    return source.read_text("METADATA") or source.read_text("PKG-INFO") or ""


@functools.lru_cache(maxsize=1024)
def _headers(text: str) -> Message:
    """Parse metadata up to the first empty line: what follows is a long page of prose."""
    return message_from_string(text.partition("\n\n")[0])


def _text(source: metadata.Distribution, file: str) -> str:
    """Return the text of a file beside a distribution's metadata; empty if it cannot be read."""
    try:
        return source.read_text(file) or ""
    except Exception:  # noqa: BLE001 - somebody else's file can be wrong in any way
        return ""
