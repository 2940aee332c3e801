"""What others wrote, shown so that a terminal obeys nothing of it."""

import pytest
from regrad.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b31m", r"\x9b31m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten\b", r"over\rwritten\x08"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("two\nlines\u2028three", r"two\nlines\u2028three"),
        ("half\ud800", r"half\ud800"),
        ("tag\U000e0041", r"tag\U000e0041"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_stands_as_its_escape(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["", "plain", "η ← θ̂ − 1", "naïve\xa0text", "梯度", "[red]\\"])
def test_what_can_be_seen_stays(text):
    assert printable(text) == text


def test_characters_to_keep_and_objects_that_are_no_text():
    assert printable("a\n\tb\x1b", keep="\n") == "a\n\\tb\\x1b"
    assert printable(ValueError("no\x07")) == r"no\x07"
