"""Every member has the same shape: read one, know all."""

import re

import pytest

CARD_LIMIT = 80
MEMBER_FILES = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "src", "tests"}
CARD_HEADINGS = [
    "What it changes",
    "Rule",
    "Use",
    "Options",
    "Cost",
    "Works with / does not",
    "Source, and where we differ",
    "Claimed and reproduced",
]
CHANGELOG_LINE = re.compile(
    r"## \d+\.\d+\.\d+ \((unreleased|\d{4}-\d\d-\d\d)\)$"
    r"|### (Added|Changed|Deprecated|Removed|Fixed|Security)$"
    r"|- \S"
)
SHARED_KEYS = ("requires-python", "license", "license-files", "authors", "classifiers", "readme")
# Written in pieces, so that this file does not match itself.
PATH_OF_ONE_MACHINE = re.compile(r"(?:^|[^\w.~/])/(?:home|root|work|mnt|Users|opt)" + r"/[a-zA-Z]")
PACKAGE_INDEX = re.compile(
    "|".join(
        ("index" + "-url", r"tool\.uv\." + "index", "find" + "-links", "pypi" + r"\.org/simple")
    )
)


def test_a_member_has_the_files_of_every_member_and_no_others(member):
    found = {
        path.name for path in member.path.iterdir() if not path.name.startswith((".", "__"))
    } - {"dist", "build"}
    assert found == MEMBER_FILES


def test_a_package_is_typed_and_named_after_its_distribution(member):
    assert member.package == member.project["name"].replace("-", "_")
    assert (member.path / "src" / member.package / "py.typed").is_file()
    assert (member.path / "src" / member.package / "__init__.py").is_file()


def test_a_plugin_is_named_after_its_folder_and_has_a_correction_or_an_optimizer_and_a_reference(
    plugin,
):
    modules = {path.stem for path in plugin.sources}
    assert plugin.project["name"] == f"regrad-{plugin.path.name}"
    assert modules & {"correction", "optimizer"}
    assert (plugin.path / "tests" / "reference.py").is_file()
    offered = plugin.project["entry-points"]
    assert set(offered) <= {"regrad", "regrad.optimizers"}
    assert all(
        value.startswith(f"{plugin.package}:")
        for group in offered.values()
        for value in group.values()
    )


def test_a_members_metadata_says_the_same_as_the_others_where_it_must(member, members):
    first, own = members[0].pyproject, member.pyproject
    assert own["build-system"] == first["build-system"]
    assert {key: own["project"][key] for key in SHARED_KEYS} == {
        key: first["project"][key] for key in SHARED_KEYS
    }
    assert own["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        f"src/{member.package}"
    ]
    assert "dynamic" not in own["project"]


def test_dependencies_are_ranges_with_a_lower_end_and_never_pins(member):
    for line in member.project["dependencies"]:
        assert ">=" in line, line
        assert "==" not in line, line
        assert not line.startswith("regrad") or ",<" in line, line


def test_a_member_has_the_licence_of_the_repository(member, root):
    assert (member.path / "LICENSE").read_text() == (root / "LICENSE").read_text()


def test_a_changelog_speaks_of_the_version_that_the_metadata_names(member):
    text = (member.path / "CHANGELOG.md").read_text()
    assert text.startswith(f"# Changelog of {member.project['name']}\n")
    assert f"\n## {member.project['version']} " in text


def test_changelogs_have_one_form(member):
    """Entries from the newest on, in the sections of Keep a Changelog where they need sections."""
    lines = (member.path / "CHANGELOG.md").read_text().splitlines()[1:]
    odd = [line for line in lines if line and not CHANGELOG_LINE.match(line)]
    assert odd == []
    dates = [line.rpartition("(")[2] for line in lines if line.startswith("## ")]
    assert dates == sorted(dates, reverse=True)  # "unreleased" is after every number


def test_a_changelog_names_whatever_the_member_offers(member):
    text = (member.path / "CHANGELOG.md").read_text()
    offered = list(member.project.get("scripts", {}))
    for group, points in member.project.get("entry-points", {}).items():
        if group.startswith("regrad"):
            offered += points
    assert [name for name in offered if f"`{name}" not in text] == []


def test_a_card_has_every_heading_in_order_and_at_most_80_lines(plugin):
    lines = (plugin.path / "README.md").read_text().splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == CARD_HEADINGS
    assert len(lines) <= CARD_LIMIT


def test_a_card_shows_the_use_in_at_most_six_lines(plugin):
    text = (plugin.path / "README.md").read_text()
    use = text.partition("\n## Use\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", use, flags=re.DOTALL)
    assert 0 < len([line for line in block.splitlines() if line.strip()]) <= 6


def test_a_card_names_every_option(plugin):
    regrad = pytest.importorskip("regrad")
    text = (
        (plugin.path / "README.md").read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    )
    for name in plugin.project["entry-points"].get("regrad", {}):
        loaded = regrad.load(name)
        for option in getattr(getattr(loaded, "Options", None), "__dataclass_fields__", {}):
            assert f"`{option}`" in text, f"{name} has the option {option}, its card does not"


def test_no_tracked_file_names_a_path_of_one_machine_or_a_package_index(tracked):
    for path in tracked:
        if path.suffix not in {".png", ".gz", ".woff2"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                place = f"{path.name}:{number}: {line}"
                assert not PATH_OF_ONE_MACHINE.search(line), place
                assert not PACKAGE_INDEX.search(line), place


def test_what_tools_make_is_not_tracked(tracked, root):
    names = {path.relative_to(root).as_posix() for path in tracked}
    made = [
        n for n in names if n == "uv.lock" or n.endswith((".pyc", ".whl", ".db")) or "mlruns/" in n
    ]
    assert made == []


def test_source_has_no_unfinished_marks(member):
    marks = re.compile(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b|To be written")
    assert [path.name for path in member.sources if marks.search(path.read_text())] == []
