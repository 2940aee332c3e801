"""`regrad plugins new`: a distribution of one's own, made from the smallest shipped plugin as it is."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import regrad
from regrad.correction import did_you_mean
from regrad.registry import Entry

CARRIED = "distribution"  # where a plugin's wheel carries what is outside its package
COPIED = ("pyproject.toml", "LICENSE", "README.md", "tests")
CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", CARRIED)
KEPT = {"Use", "Options"}  # sections of a card that hold for the copy too
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Source(NamedTuple):
    """A plugin whose whole distribution is here.

    Attributes:
        entry: What its metadata say.
        package: Folder of its package.
        rest: Folder with `pyproject.toml`, the card and the tests.
        size: Bytes of Python in the package.
    """

    entry: Entry
    package: Path
    rest: Path
    size: int


def new_plugin(name: str, out: Path, like: str | None = None) -> tuple[Path, str]:
    """Write a distribution that offers a correction of a new name.

    What is written is a shipped plugin under other names, tests and card included, so
    that it installs and passes the conformance kit before anything is edited. Of the
    card the sections that speak of the original alone are emptied.

    Args:
        name: Of the correction: lower-case words, with hyphens between them.
        out: Folder in which the distribution's folder "regrad-NAME" is made.
        like: The correction to copy; by default the smallest one that is installed.

    Returns:
        The folder, and the name of the correction that it was made from.

    Raises:
        ValueError: If the name is taken or cannot be one, the folder exists, or nothing
            installed can be copied. Nothing is written then.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"name must be lower-case words with hyphens between them, such as 'my-method', got {name!r}"
        )
    taken = regrad.available().get(name)
    if taken:
        raise ValueError(f"name must be a new one, got {name!r}, which {taken.distribution} offers")
    folder = out / f"regrad-{name}"
    if folder.exists():
        raise ValueError(
            f"out must not have a folder {folder.name!r} yet, got '{out}'; move that folder away"
        )
    source = _choose(like)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-plugin-") as aside:
        made = Path(aside) / folder.name
        _copy(source, made, name)
        made.rename(folder)
    return folder, source.entry.name


def _choose(like: str | None) -> Source:
    """Return the plugin to copy."""
    entries = regrad.available()
    if like is not None and like not in entries:
        raise ValueError(
            f"like must be an installed correction, got {like!r}{did_you_mean(like, entries)}"
        )
    found = [source for source in map(_source, entries.values()) if source]
    if like is not None:
        found = [source for source in found if source.entry.name == like]
    if not found:
        whose = f"{like!r}" if like else "the smallest shipped plugin"
        raise ValueError(
            f"{whose} must be installed with its tests to be copied; pip install regrad-centralization"
        )
    return min(found, key=lambda source: source.size)


def _source(entry: Entry) -> Source | None:
    """Return where a plugin's whole distribution lies, or None where it cannot be copied."""
    if entry.refused:
        return None
    distribution = metadata.distribution(entry.distribution)
    ours = [
        point for point in distribution.entry_points if point.group.partition(".")[0] == "regrad"
    ]
    others = [line for line in distribution.requires or [] if line.startswith("regrad-")]
    module, _, attribute = entry.value.partition(":")
    spec = find_spec(module)
    if (
        len(ours) > 1
        or others
        or "." in module
        or not attribute.isidentifier()
        or not spec
        or not spec.origin
    ):
        return None  # only one correction of its own, offered from the top of its package
    package = Path(spec.origin).parent
    rest = _editable(distribution) or package / CARRIED
    whole = all((rest / item).exists() for item in COPIED)
    size = sum(path.stat().st_size for path in package.glob("*.py"))
    return Source(entry, package, rest, size) if whole else None


def _editable(distribution: metadata.Distribution) -> Path | None:
    """Return the source folder of a distribution that is installed from one, as it is edited."""
    told: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlparse(told["url"]).path))


def _copy(source: Source, made: Path, name: str) -> None:
    """Write the source's files under other names."""
    words = name.split("-")
    package, kind = "_".join(["regrad", *words]), "".join(map(str.title, words))
    old_package, _, old_kind = source.entry.value.partition(":")
    shutil.copytree(source.package, made / "src" / package, ignore=CACHES)
    shutil.copytree(source.rest / "tests", made / "tests", ignore=CACHES)
    for item in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copyfile(source.rest / item, made / item)
    renames = {
        re.escape(source.entry.distribution): f"regrad-{name}",
        old_package: package,
        rf"\b{old_kind}\b": kind,
        rf"(?<=_){source.entry.name}|{source.entry.name}(?=_)": "_".join(words),
        rf"\b{source.entry.name}\b": name,
    }
    for path in made.rglob("*"):
        if path.suffix in {".py", ".toml", ".md"}:
            text = path.read_text(encoding="utf-8")
            for old, new in renames.items():
                text = re.sub(old, new, text)
            path.write_text(text, encoding="utf-8")
    origin = f"Made from {source.entry.distribution} {source.entry.version}"
    _write_project(made / "pyproject.toml", name)
    _write_card(made / "README.md", name, origin)
    changes = f"# Changelog of regrad-{name}\n\n## 0.1.0 (unreleased)\n\n- {origin}.\n"
    (made / "CHANGELOG.md").write_text(changes, encoding="utf-8")


def _write_project(path: Path, name: str) -> None:
    """Give the copy a version, an author and a description of its own, without what only a shipped plugin needs."""
    text = path.read_text(encoding="utf-8")
    for table in ("tool.uv.sources", "tool.hatch.build.targets.wheel.force-include"):
        text = re.sub(
            rf"^\[{re.escape(table)}\].*\n(?:[^\[\n].*\n|\n)*", "", text, flags=re.MULTILINE
        )
    for key, value in {
        "version": '"0.1.0"',
        "description": f'"{name}: what it does, in one line"',
        "authors": '[{ name = "Your name" }]',
    }.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    tomllib.loads(text)  # to fail here rather than at the installation
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _write_card(path: Path, name: str, origin: str) -> None:
    """Keep the headings of the card, and only those sections that hold for the copy."""
    _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    card = [
        f"# regrad-{name}: what it is, in a few words\n\n{origin}: every empty section is yours to write.\n"
    ]
    for section in sections:
        heading, _, body = section.partition("\n")
        card.append(f"## {heading}\n\n{body.strip() if heading in KEPT else 'Yours to write.'}\n")
    path.write_text("\n".join(card), encoding="utf-8")
