"""What the check of a release finds, on small members with one thing wrong each."""

import importlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

RELEASE = Path(__file__).parent.parent / "release"
sys.path.insert(0, str(RELEASE))
check = importlib.import_module("check")
addresses = importlib.import_module("addresses")
installed = importlib.import_module("installed")
members = importlib.import_module("members")
same_files = importlib.import_module("same_files")
sys.path.remove(str(RELEASE))

PYPROJECT = """[build-system]
requires = ["hatchling"]

[project]
name = "{name}"
version = "{version}"
description = "A plugin"
readme = "README.md"
requires-python = ">=3.11"
license = "MIT"
license-files = ["LICENSE"]
dependencies = {dependencies}

[project.entry-points.regrad]
own = "regrad_own:Own"
"""
METADATA = """Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: A plugin
License-Expression: MIT
License-File: LICENSE
Requires-Python: >=3.11
Description-Content-Type: text/markdown

# A card
"""


class Workspace:
    """Members in a folder, and what was built of them."""

    def __init__(self, root):
        self.root = root
        self.dist = root / "dist"
        self.dist.mkdir()
        (root / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["members/*"]\n')

    def add(self, name, version="1.0.0", dependencies="[]"):
        """Write a member as it must be, and return it."""
        package = name.replace("-", "_")
        path = self.root / "members" / name
        for folder in (path / "src" / package, path / "tests"):
            folder.mkdir(parents=True)
        text = PYPROJECT.format(name=name, version=version, dependencies=dependencies)
        (path / "pyproject.toml").write_text(text)
        (path / "README.md").write_text("# A card\n")
        (path / "LICENSE").write_text("Do as you like.\n")
        (path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {version} (unreleased)\n\n- Made.\n")
        (path / "src" / package / "__init__.py").write_text("")
        (path / "src" / package / "py.typed").write_text("")
        (path / "tests" / "test_own.py").write_text("")
        return next(one for one in self.members() if one.name == name)

    def members(self):
        return members.read_members(self.root)

    def build(self, member, *, metadata=None, without=(), extra=()):
        """Write a member's files; `without` and `extra` name what their content lacks or has."""
        if metadata is None:
            metadata = METADATA.format(name=member.name, version=member.version)
        package, stem = member.package, member.stem
        wheel = {
            f"{package}/__init__.py": "",
            f"{package}/py.typed": "",
            f"{stem}.dist-info/METADATA": metadata,
            f"{stem}.dist-info/licenses/LICENSE": "Do as you like.\n",
            **dict.fromkeys(extra, ""),
        }
        with zipfile.ZipFile(self.dist / member.wheel, "w") as archive:
            for name, text in wheel.items():
                if name not in without:
                    archive.writestr(name, text)
        source = {"PKG-INFO": metadata}
        for path in sorted(member.path.rglob("*")):
            if path.is_file():
                source[path.relative_to(member.path).as_posix()] = path.read_text()
        with tarfile.open(self.dist / member.source, "w:gz") as archive:
            for name, text in source.items():
                if name not in without:
                    entry = tarfile.TarInfo(f"{stem}/{name}")
                    entry.size = len(text.encode())
                    archive.addfile(entry, io.BytesIO(text.encode()))

    def problems(self, tag=None):
        return [*check.problems(self.dist, self.members(), tag)]


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def own(workspace):
    return workspace.add("regrad-own")


def test_what_is_as_it_must_be_is_not_complained_about(workspace):
    core = workspace.add("regrad")
    plugin = workspace.add("regrad-own", dependencies='["regrad>=1.0,<1.1", "torch>=2"]')
    for one in (core, plugin):
        workspace.build(one)
    assert workspace.problems() == []


def test_files_that_are_missing_or_of_nobody_are_named(workspace, own):
    (workspace.dist / "regrad_other-1.0.0.tar.gz").write_text("")
    assert workspace.problems() == [
        "regrad_own-1.0.0-py3-none-any.whl is missing",
        "regrad_own-1.0.0.tar.gz is missing",
        "regrad_other-1.0.0.tar.gz belongs to no member",
    ]


@pytest.mark.parametrize(
    ("without", "problem"),
    [
        ("regrad_own/py.typed", "the wheel lacks regrad_own/py.typed"),
        ("regrad_own/__init__.py", "the wheel lacks regrad_own/__init__.py"),
        (
            "regrad_own-1.0.0.dist-info/licenses/LICENSE",
            "regrad_own-1.0.0.dist-info/licenses/LICENSE is missing",
        ),
        ("LICENSE", "regrad_own-1.0.0/LICENSE is missing"),
        ("CHANGELOG.md", "the source distribution lacks regrad_own-1.0.0/CHANGELOG.md"),
        ("tests/test_own.py", "the source distribution lacks regrad_own-1.0.0/tests/test_own.py"),
    ],
)
def test_what_a_file_lacks_is_named(workspace, own, without, problem):
    workspace.build(own, without=[without])
    found = workspace.problems()
    assert f"regrad-own: {problem}" in found
    assert all(without.rpartition("/")[2] in one for one in found)


def test_what_a_wheel_would_install_beside_its_package_is_named(workspace, own):
    workspace.build(own, extra=["tests/__init__.py"])
    assert workspace.problems() == ["regrad-own: the wheel would also install tests/__init__.py"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("Version: 1.0.0", "Version: 1.0.1", "version must be '1.0.0', got '1.0.1'"),
        ("# A card", "# Another", "the description is not README.md"),
        ("# A card", "", "the description is not README.md"),
        ("text/markdown", "text/plain", "type of the README must be 'text/markdown', got"),
        ("License-File: LICENSE\n", "", "licence files must be ['LICENSE'], got None"),
        (": MIT", ": No-Such-Licence", "metadata are not valid: "),
    ],
)
def test_metadata_that_say_something_else_are_named(workspace, own, old, new, problem):
    metadata = METADATA.format(name="regrad-own", version="1.0.0").replace(old, new)
    workspace.build(own, metadata=metadata)
    found = workspace.problems()
    assert len(found) == 2  # of both files
    assert all(one.startswith(f"regrad-own: {problem}") for one in found)


@pytest.mark.parametrize(
    ("needed", "problem"),
    [
        ("regrad>=0.9,<1.0", "which leaves out 1.0.0, the version beside it"),
        ("regrad>=1.0", "which has no upper end"),
    ],
)
def test_a_range_that_does_not_fit_the_member_beside_it_is_named(workspace, needed, problem):
    workspace.add("regrad")
    workspace.add("regrad-own", dependencies=f'["{needed}"]')
    (found,) = check.disagreements(workspace.members())
    assert found.startswith("regrad-own needs regrad")
    assert found.endswith(problem)


def test_members_of_two_versions_are_named(workspace):
    workspace.add("regrad")
    workspace.add("regrad-own", version="1.0.1")
    (found,) = check.disagreements(workspace.members())
    assert found == "members must have one version, got regrad 1.0.0, regrad-own 1.0.1"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "CHANGELOG.md is missing"),
        ("# Changelog\n", "CHANGELOG.md has no entry"),
        ("## 0.9.0 (2026-01-02)\n", "CHANGELOG.md begins with 0.9.0, the metadata say 1.0.0"),
        ("## News\n", "CHANGELOG.md must begin with '## 1.0.0 (date)', got '## News'"),
        ("## 1.0.0 (soon)\n", "CHANGELOG.md must begin with '## 1.0.0 (date)', got"),
    ],
)
def test_a_changelog_that_does_not_begin_with_the_version_is_named(own, text, problem):
    path = own.path / "CHANGELOG.md"
    path.unlink()
    if text is not None:
        path.write_text(text)
    (found,) = check.problems_of_changelog(own, is_release=False)
    assert found.startswith(problem)


@pytest.mark.parametrize("heading", ["## Unreleased", "## 1.0.0 (unreleased)"])
def test_a_changelog_may_be_without_a_date_until_the_release(own, heading):
    (own.path / "CHANGELOG.md").write_text(f"{heading}\n")
    assert [*check.problems_of_changelog(own, is_release=False)] == []
    (found,) = check.problems_of_changelog(own, is_release=True)
    assert found == f"CHANGELOG.md must date the entry of 1.0.0, got {heading!r}"


def test_a_release_has_its_tag_links_that_lead_somewhere_and_addresses(workspace, own):
    (own.path / "README.md").write_text("[there](../README.md) [here](#use)\n")
    assert [*check.problems_of_release(own, "v1.1.0")] == [
        "the tag must be v1.0.0, got 'v1.1.0'",
        "README.md links '../README.md', which leads nowhere on the index",
        "pyproject.toml has no [project.urls]",
    ]


# addresses


def test_a_card_gets_the_addresses_of_the_files_that_it_links(workspace, own):
    (workspace.root / "docs").mkdir()
    (workspace.root / "docs" / "results.md").write_text("")
    card = own.path / "README.md"
    card.write_text("[a](../../docs/results.md#x), [b](https://a.example), [c](#use)\n")
    addresses.write_addresses(own, workspace.root, "https://a.example/us/it", "v1.0.0")
    files = "https://a.example/us/it/blob/v1.0.0"
    assert (
        card.read_text() == f"[a]({files}/docs/results.md#x), [b](https://a.example), [c](#use)\n"
    )
    (written,) = workspace.members()
    assert written.project["urls"] == {
        "Repository": "https://a.example/us/it",
        "Documentation": f"{files}/docs/index.md",
        "Changelog": f"{files}/members/regrad-own/CHANGELOG.md",
    }
    assert written.project["entry-points"] == own.project["entry-points"]
    assert [*check.problems_of_release(written, "v1.0.0")] == []
    before = (own.path / "pyproject.toml").read_text()
    addresses.write_addresses(written, workspace.root, "https://other.example", "v1.0.0")
    assert (own.path / "pyproject.toml").read_text() == before


@pytest.mark.parametrize("link", ["../../docs/gone.md", "../../../../etc", "/etc/hostname"])
def test_a_link_that_leads_to_nothing_of_the_repository_is_refused(workspace, own, link):
    (own.path / "README.md").write_text(f"[a]({link})")
    with pytest.raises(ValueError, match="link must lead to a file of the repository, got"):
        addresses.write_addresses(own, workspace.root, "https://a.example", "v1.0.0")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["http://a.example", "v1"], "address must be that of a repository"),
        (['https://a.example"', "v1"], "address must be that of a repository"),
        (["https://a.example/us/it", "v1)"], "tag must be letters"),
    ],
)
def test_an_address_or_tag_of_another_form_is_refused_before_anything_is_written(given, problem):
    with pytest.raises(ValueError, match=problem):
        addresses.main(given)


def test_every_link_in_a_card_of_this_repository_can_be_an_address(root):
    for member in members.read_members(root):
        text = (member.path / "README.md").read_text()
        written = addresses.with_addresses(text, member.path, root, "https://a.example")
        assert addresses.dead_links(written) == []


# installed


def test_a_package_that_is_not_typed_or_does_not_import_is_an_error(tmp_path, monkeypatch):
    info = tmp_path / "regrad_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: regrad-probe\nVersion: 1.0\n\n# A card\n")
    (info / "RECORD").write_text("regrad_probe-1.0.dist-info/licenses/LICENSE,,\n")
    (info / "licenses").mkdir()
    (info / "licenses" / "LICENSE").write_text("MIT")  # some Pythons list only what exists
    package = tmp_path / "regrad_probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "regrad_probe", raising=False)
    with pytest.raises(FileNotFoundError, match=r"regrad_probe is installed without py\.typed"):
        installed.main("regrad-probe", "regrad_probe")
    (package / "py.typed").write_text("")
    assert installed.main("regrad-probe", "regrad_probe") == 0
    (package / "broken.py").write_text("import nothing_of_this_name\n")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        installed.main("regrad-probe", "regrad_probe")
    del sys.modules["regrad_probe"]


def test_what_a_source_distribution_installs_otherwise_than_the_wheel_is_named(workspace, own):
    workspace.build(own)
    wheel = workspace.dist / own.wheel
    site = workspace.root / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert same_files.different_files(wheel, site) == []
    (site / "regrad_own" / "__init__.py").write_text("other = 1")
    (site / "regrad_own" / "py.typed").unlink()
    different = ["regrad_own/__init__.py", "regrad_own/py.typed"]
    assert same_files.different_files(wheel, site) == different


# this repository


def test_the_versions_and_ranges_of_this_repository_agree(root):
    assert [*check.disagreements(members.read_members(root))] == []


def test_the_changelogs_of_this_repository_begin_with_the_version(root):
    for member in members.read_members(root):
        assert [*check.problems_of_changelog(member, is_release=False)] == [], member.name
