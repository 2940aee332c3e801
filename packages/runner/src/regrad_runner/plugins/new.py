"""`regrad plugins new`: your own distribution, which works before anything is edited."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import regrad
from regrad import distributions
from regrad.correction import did_you_mean
from regrad.registry import Entry

from regrad_runner.files import folder_aside
from regrad_runner.plugins.copied_code import renamed, without_prose
from regrad_runner.plugins.names import check_name, class_of, package_of
from regrad_runner.plugins.sources import folder_of

SKELETON = Path(__file__).with_name("skeleton")
MINIMAL = ("shared", "minimal")  # folders of the skeleton
FULL = ("shared", "full")
EVERY_FOLDER = ("shared", "minimal", "full")
BLANK = "(fill in)"
YOUR_NAME = "(fill in your name)"
CARRIED = "distribution"  # where a plugin's wheel carries what is outside its package
COPIED = ("pyproject.toml", "LICENSE", "README.md", "tests")
NEEDS = ["regrad>=0.1,<0.2", "torch>=2.12"]
EXAMPLE = "| `bound` | largest size of a gradient element | 1.0 | positive |"


class CopiedPlugin(NamedTuple):
    """A plugin whose code is copied: its whole distribution is here.

    Attributes:
        entry: What its metadata say.
        package: Folder of its package.
        rest: Folder with `pyproject.toml`, the card and the tests.
    """

    entry: Entry
    package: Path
    rest: Path


class PluginRequest(NamedTuple):
    """What an author asks for.

    Attributes:
        name: Of the correction: lower-case words, with hyphens between them.
        author: For the licence and the metadata; empty for a blank to fill in.
        is_full: Whether to write the large example, with functions, more tests and a whole card.
        source: A plugin whose code to start from instead of an example, with a whole card.
    """

    name: str
    author: str
    is_full: bool
    source: CopiedPlugin | None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the skeleton that it is written from."""
        return FULL if self.is_full or self.source else MINIMAL


def new_plugin(
    name: str,
    out: Path,
    like: str | None = None,
    *,
    full: bool = False,
    author: str | None = None,
) -> Path:
    """Write a distribution that offers a correction of a new name.

    It holds a small example with its reference and a test, a licence, the workflows that test
    and publish it, and blanks for the author to fill in. It installs and passes the
    conformance kit before anything is edited. Nothing is cited.

    Args:
        name: Of the correction: lower-case words, with hyphens between them.
        out: Folder in which the distribution's folder "regrad-NAME" is made.
        like: An installed correction whose code to start from instead of the example. Its
            docstrings, comments and card are left out.
        full: Whether the example has functions of tensors, more tests and a whole card.
        author: For the licence and the metadata; the name that git knows by default.

    Returns:
        The folder.

    Raises:
        ValueError: If the name is taken or not allowed, the folder exists or cannot be
            written, or `like` cannot be copied. Nothing is written then.
    """
    source = _source_of(like) if like is not None else None
    check_name(name, _python_of(source))
    folder = out / f"regrad-{name}"
    if os.path.lexists(folder):
        raise ValueError(
            f"out must not have a folder {folder.name!r} yet, got '{out}'; move that folder away"
        )
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"out must be a folder, got '{out}', which is none")
    known_author = _one_line(author) if author is not None else _author_in_git()
    request = PluginRequest(name, known_author, full, source)
    _write_whole(folder, partial(_write, request=request))
    return folder


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a function write a folder, whole or not at all; one that came meanwhile stays.

    Raises:
        ValueError: If it cannot be written.
    """
    out = folder.parent
    # os.path does not raise for a name that is too long
    missing = [place for place in (out, *out.parents) if not os.path.exists(place)]  # noqa: PTH110
    try:
        with folder_aside(folder, replace=False) as aside:
            write(aside)
    except BaseException as problem:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        if not isinstance(problem, OSError):
            raise
        rule = "out must be a folder that can be written"
        raise ValueError(f"{rule}, got '{out}': {problem.strerror or problem}") from problem


def _write(made: Path, request: PluginRequest) -> None:
    """Write the files of a distribution."""
    values = _values(request)
    for file, text in _templates(request.folders):
        is_code = file.parts[0] in ("package", "tests")
        if request.source is None or not is_code:
            _write_file(made, file, Template(text).substitute(values), request.name)
    if request.source is not None:
        _copy_code(made, request.name, request.source)


def _templates(folders: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Return files of some of the skeleton's folders, where they go, and their texts."""
    for folder in folders:
        for path in sorted((SKELETON / folder).rglob("*.txt")):
            place = path.relative_to(SKELETON / folder).with_suffix("")
            yield place, path.read_text(encoding="utf-8")


def _write_file(made: Path, file: Path, text: str, name: str) -> None:
    """Write one file; those of the package lie in `src`."""
    if file.parts[0] == "package":
        file = Path("src", package_of(name), *file.parts[1:])
    target = made / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def _values(request: PluginRequest) -> dict[str, str]:
    """Return what fills the skeleton's blanks."""
    name = request.name
    origin = "The example that `regrad plugins new` writes: replace it with your rule."
    dependencies = NEEDS
    options = EXAMPLE
    if request.source is not None:
        entry = request.source.entry
        origin = (
            f"Started from the code of {entry.distribution} {entry.version}, "
            "whose licence is kept beside ours."
        )
        pyproject = (request.source.rest / "pyproject.toml").read_text(encoding="utf-8")
        dependencies = tomllib.loads(pyproject).get("project", {}).get("dependencies", NEEDS)
        options = _option_rows(entry.name)
    return {
        "name": name,
        "package": package_of(name),
        "kind": class_of(name),
        "author": request.author or YOUR_NAME,
        "quoted_author": json.dumps(request.author or YOUR_NAME, ensure_ascii=False),
        "year": str(datetime.now(UTC).year),
        "dependencies": json.dumps(dependencies, ensure_ascii=False),
        "options": options,
        "origin": origin,
    }


def _author_in_git() -> str:
    """Return the name that git knows the user by; empty if it knows none."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "config", "user.name"]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - a fixed command
    return _one_line(done.stdout.decode("utf-8", errors="ignore"))


def _one_line(text: str) -> str:
    """Return a text without line breaks, and without what a terminal would obey."""
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())


def _option_rows(name: str) -> str:
    """Return the rows of a card's table of options."""
    loaded = regrad.load(name)
    if isinstance(loaded, regrad.Composition):
        raise TypeError(f"like must be one correction, got {name!r}, which is several together")
    fields = dataclasses.fields(loaded.Options)
    rows = [f"| `{field.name}` | {BLANK} | {field.default} | {BLANK} |" for field in fields]
    return "\n".join(rows) or "| none | | | |"


def _source_of(like: str) -> CopiedPlugin:
    """Return the plugin to start from.

    Raises:
        ValueError: If there is none of this name, or it cannot be copied.
    """
    entries = regrad.available()
    if like not in entries:
        raise ValueError(
            f"like must be an installed correction, got {like!r}{did_you_mean(like, entries)}"
        )
    source = _whole(entries[like])
    if source is None:
        raise ValueError(
            f"like must be alone in a distribution that is here with its tests, got {like!r}; "
            "leave it out for an example to edit"
        )
    for _, path in _code_of(source):
        try:
            without_prose(path.read_text(encoding="utf-8"))
        except (SyntaxError, tokenize.TokenError, ValueError, OSError) as problem:
            raise ValueError(f"like must have code that can be read, got '{path}'") from problem
    return source


def _whole(entry: Entry) -> CopiedPlugin | None:
    """Return where a plugin's whole distribution lies, or None if it cannot be copied."""
    found = distributions.find(entry.distribution, entry.version)
    module, _, attribute = entry.value.partition(":")
    if entry.refused or found is None or not distributions.NAME.fullmatch(entry.distribution):
        return None  # its name becomes that of a file
    if not module.isidentifier() or not attribute.isidentifier():
        return None  # only a correction that is offered from the top of its package
    groups = [point.group.partition(".")[0] for point in found.source.entry_points]
    others = [line for line in found.requires if line.startswith("regrad-")]
    if groups.count("regrad") > 1 or others:
        return None
    package = folder_of(module)
    if package is None:
        return None
    rest = _editable(found) or package / CARRIED
    if not all((rest / name).exists() for name in COPIED):
        return None
    return CopiedPlugin(entry, package, rest)


def _editable(found: distributions.Installed) -> Path | None:
    """Return the source folder of a distribution that is installed from one, as it is edited."""
    try:
        direct_url: dict[str, Any] = json.loads(found.read("direct_url.json") or "{}")
        is_editable = direct_url.get("dir_info", {}).get("editable")
        url = str(direct_url.get("url"))
    except (ValueError, AttributeError):  # no JSON, or of another form
        return None
    return Path(url2pathname(urlparse(url).path)) if is_editable else None


def _python_of(source: CopiedPlugin | None) -> list[str]:
    """Return the texts of the Python files to write, before the author's names are in them."""
    if source is not None:
        return [path.read_text(encoding="utf-8") for _, path in _code_of(source)]
    values = _values(PluginRequest("a-name-that-nobody-has", "", is_full=True, source=None))
    texts = [text for file, text in _templates(EVERY_FOLDER) if file.suffix == ".py"]
    return [Template(text).substitute(values) for text in texts]


def _code_of(source: CopiedPlugin) -> Iterator[tuple[Path, Path]]:
    """Return the Python files of a plugin: where each goes, and where it is."""
    for part, folder in (("package", source.package), ("tests", source.rest / "tests")):
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(folder)
            is_hidden = any(name.startswith(".") for name in place.parts)
            if CARRIED not in place.parts and not is_hidden:
                yield Path(part, place), path


def _copy_code(made: Path, name: str, source: CopiedPlugin) -> None:
    """Write a plugin's code under new names and without its prose, and its licence beside ours."""
    old_distribution = source.entry.distribution
    old_package, _, old_class = source.entry.value.partition(":")
    names = {old_package: package_of(name), old_class: class_of(name)}
    words = _renames(source.entry.name, name)
    for old, new in {old_distribution: f"regrad-{name}", **names}.items():
        words[rf"\b{re.escape(old)}\b"] = new
    for file, path in _code_of(source):
        code = without_prose(path.read_text(encoding="utf-8"))
        _write_file(made, file, renamed(code, names, words), name)
    _write_file(made, Path("package", "py.typed"), "", name)
    licence = (source.rest / "LICENSE").read_text(encoding="utf-8")
    _write_file(made, Path(f"LICENSE.{old_distribution}"), licence, name)


def _renames(old: str, new: str) -> dict[str, str]:
    """Return what to write for a correction's name in strings, by pattern.

    Beside an underscore it is a part of an identifier.
    """
    name = re.escape(old)
    return {
        rf"(?<=_){name}\b|\b{name}(?=_)": new.replace("-", "_"),
        rf"\b{name}\b": new,
    }
