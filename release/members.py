"""The members of the workspace, as their files name them. Needs the standard library only.

Usage: python release/members.py
Prints the members as JSON, for the release workflow's matrix.
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace.

    Attributes:
        path: Its folder.
        pyproject: Its `pyproject.toml`.
    """

    path: Path
    pyproject: dict[str, Any]

    @property
    def project(self) -> dict[str, Any]:
        """The table `[project]`."""
        table: dict[str, Any] = self.pyproject["project"]
        return table

    @property
    def name(self) -> str:
        """The name of the distribution."""
        return str(self.project["name"])

    @property
    def version(self) -> str:
        """The version of the distribution."""
        return str(self.project["version"])

    @property
    def package(self) -> str:
        """The name by which it is imported."""
        return self.name.replace("-", "_")

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return f"{self.package}-{self.version}"

    @property
    def wheel(self) -> str:
        """The name of its wheel."""
        return f"{self.stem}-py3-none-any.whl"

    @property
    def source(self) -> str:
        """The name of its source distribution."""
        return f"{self.stem}.tar.gz"


def read_members(root: Path) -> list[Member]:
    """Return the members of a workspace, as its patterns find them."""
    workspace = _read_toml(root / "pyproject.toml")["tool"]["uv"]["workspace"]
    paths: list[Path] = []
    for pattern in workspace["members"]:
        paths += sorted(root.glob(pattern))
    return [Member(path, _read_toml(path / "pyproject.toml")) for path in paths]


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    """Print name and package of every member."""
    listed = [{"name": one.name, "package": one.package} for one in read_members(ROOT)]
    sys.stdout.write(f"{json.dumps(listed)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
