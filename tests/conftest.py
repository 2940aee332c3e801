"""Members, plugins and files of the repository, found in the folders and never listed."""

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace."""

    path: Path

    @property
    def folder(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def is_plugin(self) -> bool:
        return self.path.parent.name == "plugins"

    @property
    def pyproject(self) -> dict:
        return tomllib.loads((self.path / "pyproject.toml").read_text())

    @property
    def project(self) -> dict:
        return self.pyproject["project"]

    @property
    def package(self) -> str:
        """The name by which it is imported."""
        (package,) = [path.parent.name for path in (self.path / "src").glob("*/__init__.py")]
        return package

    @property
    def sources(self) -> list[Path]:
        return sorted((self.path / "src").rglob("*.py"))

    @property
    def dependencies(self) -> set[str]:
        """Names of the distributions that it declares."""
        return self._names_in(self.project["dependencies"])

    @property
    def optional_dependencies(self) -> set[str]:
        """Names of the distributions that its extras declare."""
        extras = self.project.get("optional-dependencies", {})
        return self._names_in([line for lines in extras.values() for line in lines])

    @staticmethod
    def _names_in(lines: list[str]) -> set[str]:
        return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def found_members() -> list[Member]:
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]
    return [Member(path) for pattern in workspace["members"] for path in sorted(ROOT.glob(pattern))]


MEMBERS = found_members()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `member` or `plugin` once for each."""
    for name, values in (("member", MEMBERS), ("plugin", [m for m in MEMBERS if m.is_plugin])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda value: value.folder)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def members() -> list[Member]:
    return MEMBERS


@pytest.fixture(scope="session")
def normal_name():
    return normal


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Files of the repository; needs git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs a git checkout to know which files are tracked")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
