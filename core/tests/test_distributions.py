"""Damaged neighbours, by fake distributions in a temporary folder."""

import importlib
import importlib.metadata
import sys

import pytest
from regrad import distributions

GOOD = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: A fake\n"
POINTS = "[regrad]\n{name} = some_module:Thing\n"


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Return a function that writes a distribution's folder; None leaves a file out."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(folder, metadata=GOOD, points=POINTS, *, name="fake", version="1.0", place=site):
        info = place / f"{folder}.dist-info"
        info.mkdir(parents=True)
        for file, content in {"METADATA": metadata, "entry_points.txt": points}.items():
            if isinstance(content, str):
                text = content.format(name=name, version=version)
                (info / file).write_text(text, encoding="utf-8")
            elif content is not None:
                (info / file).write_bytes(content)
        if str(place) not in sys.path:
            monkeypatch.syspath_prepend(str(place))
        importlib.invalidate_caches()
        return info

    return write


def offered():
    return {
        point.name: found.name
        for found, point in distributions.offers("regrad")
        if point.value == "some_module:Thing"
    }


def broken_in(tmp_path):
    return {b.name: b.problem for b in distributions.broken() if str(tmp_path) in b.folder}


@pytest.mark.parametrize(
    ("metadata", "points", "problem"),
    [
        (None, POINTS, "it has no METADATA, or METADATA without a name"),
        ("", POINTS, "it has no METADATA, or METADATA without a name"),
        ("Version: 1.0\n", POINTS, "it has no METADATA, or METADATA without a name"),
        (b"Name: half\nSummary: \xff\xfe\n", POINTS, "its METADATA cannot be read (UnicodeDecode"),
        (GOOD, b"[regrad]\nhalf = \xff:\xfe\n", "its entry_points.txt cannot be read (UnicodeDec"),
        (GOOD, "[regrad]\nno equals sign\n", "its entry_points.txt cannot be read (TypeError"),
    ],
)
def test_a_broken_distribution_offers_nothing_is_named_and_hides_no_other(
    add, tmp_path, metadata, points, problem
):
    add("a_good-1.0", name="good")
    add("b_half-1.0", metadata, points, name="half")
    add("c_last-1.0", name="last")
    assert offered() == {"good": "good", "last": "last"}
    (told,) = broken_in(tmp_path).items()
    assert told[0] == "b_half-1.0.dist-info"
    assert told[1].startswith(problem)


@pytest.mark.parametrize("name", ["../../..", "/etc", "a b", "\x1b[31m", ".", "-", "ä"])
def test_a_distribution_of_any_name_is_found_by_what_it_says_and_never_looked_up(add, name):
    add("odd-1.0", name=name, points="[regrad]\nodd = some_module:Thing\n")
    assert offered() == {"odd": name}
    assert distributions.find(name, "1.0").name == name
    assert distributions.find(name, "2.0") is None


def test_a_folder_in_the_place_of_a_file_is_read_as_no_file(add, tmp_path):
    info = add("half-1.0", metadata=None)
    (info / "METADATA").mkdir()
    assert offered() == {}
    assert list(broken_in(tmp_path)) == ["half-1.0.dist-info"]


def test_requirements_that_cannot_be_read_are_none(add):
    info = add("fake-1.0")
    found = distributions.find("fake", "1.0")
    (info / "METADATA").write_bytes(b"\xff")
    assert found.requires == []
    assert found.read("METADATA") == ""
    assert found.read("no-such-file") == ""


def test_a_distribution_twice_in_one_folder_is_named_and_one_in_two_folders_is_usual(add, tmp_path):
    add("fake-1.0")
    add("fake-0.9", version="0.9")
    add("other-1.0", name="other")
    add("other-1.0", name="other", place=tmp_path / "user")
    doubled = {
        name: sorted(one.version for one in found)
        for name, found in distributions.doubled().items()
        if all(str(tmp_path) in one.folder for one in found)
    }
    assert doubled == {"fake": ["0.9", "1.0"]}
    assert len(offered()) == 2


@pytest.mark.parametrize("how", ["distributions.hide_broken()", "import regrad.hidden"])
def test_what_is_hidden_stops_no_library_and_is_still_named(add, python, tmp_path, how):
    add("a_good-1.0", name="good")
    add("b_junk-1.0", points="[others]\nrubbish\n", name="junk")
    code = (
        f"from regrad import distributions; {how}; import torch, importlib.metadata as m; "
        "found = {d.metadata['Name'] for d in m.distributions()}; "
        "print('good' in found, 'junk' in found, m.version('torch') == torch.__version__[:6], "
        "[b.name for b in distributions.broken()], len(m.entry_points(group='regrad')) > 0)"
    )
    told = "True False True ['b_junk-1.0.dist-info'] True\n"
    assert python(code, PYTHONPATH=str(tmp_path / "site")) == told


def test_where_nothing_is_broken_nothing_is_hidden(monkeypatch):
    monkeypatch.setattr(distributions, "broken", list)
    before = importlib.metadata.Distribution.discover
    distributions.hide_broken()
    assert importlib.metadata.Distribution.discover == before


def test_a_version_is_that_of_the_first_distribution_that_can_be_read(add):
    add("fake-1.0", metadata=None)
    add("fake-2.0", version="2.0")
    assert distributions.version("fake") == "2.0"
    assert distributions.version("FAKE") == "2.0"
    assert distributions.version("no-such-distribution") == ""


def test_what_is_broken_survives_the_backport_too(add, python, tmp_path):
    """With `importlib_metadata` loaded, Python's own function raises where it returned None before."""
    pytest.importorskip("importlib_metadata")
    add("a_good-1.0", name="good")
    add("b_half-1.0", metadata=None)
    code = (
        "import importlib_metadata, regrad; from regrad import distributions as d; "
        "print('good' in regrad.available(), [b.name for b in d.broken() if 'half' in b.name])"
    )
    assert python(code, PYTHONPATH=str(tmp_path / "site")) == "True ['b_half-1.0.dist-info']\n"
