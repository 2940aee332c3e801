import pytest
from regrad_runner.workloads.folders import DataFolder, is_hidden


def is_text(name):
    return name.endswith(".txt")


@pytest.mark.parametrize("name", [".git", ".ipynb_checkpoints", "._a.txt", "__MACOSX", "@eaDir"])
def test_what_begins_with_a_dot_or_is_a_systems_is_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["a", "a.b", "MACOSX", "checkpoints"])
def test_other_names_are_not_hidden(name):
    assert not is_hidden(name)


def test_files_come_folder_by_folder_in_the_order_of_their_paths(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/x/1.txt", "a/3.txt", "a/no.md", "0.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = DataFolder(tmp_path).files(tmp_path, is_text)
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["0.txt", "a/3.txt", "a/x/1.txt", "b/10.txt", "b/2.txt"]


def test_links_that_lead_out_are_followed_where_that_was_asked_for_and_each_file_once(tmp_path):
    for name in ("out/1.txt", "in/0.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "in" / "link.txt").symlink_to("../out/1.txt")
    with pytest.raises(ValueError, match="hold no link that points outside it"):
        DataFolder(tmp_path / "in").files(tmp_path / "in", is_text)
    data = DataFolder(tmp_path / "in", follows_links=True)
    assert len(data.files(tmp_path / "in", is_text)) == 2
    (tmp_path / "in" / "other.txt").symlink_to("../out/1.txt")
    data = DataFolder(tmp_path / "in", follows_links=True)
    with pytest.raises(ValueError, match=r"one file as '.*link.txt' and '.*other.txt'"):
        data.files(tmp_path / "in", is_text)


def test_one_file_may_be_asked_for_again(tmp_path):
    (tmp_path / "a.txt").touch()
    data = DataFolder(tmp_path)
    assert data.files_in(tmp_path, is_text) == data.files_in(tmp_path, is_text)
    assert data.files(tmp_path, is_text) == [tmp_path / "a.txt"]
