import math
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from regrad_runner.settings.checking import LONGEST_TEXT
from regrad_runner.settings.config import CompareConfig, TrainConfig
from regrad_runner.settings.loading import load_config, write_config
from regrad_runner.settings.yaml_text import read_yaml, write_yaml

ODD = [
    "no",
    "No",
    "NO",
    "yes",
    "on",
    "off",
    "y",
    "n",
    "true",
    "True",
    "false",
    "null",
    "~",
    "",
    "1_000",
    "0o10",
    "0b11",
    "0x1F",
    "010",
    "08",
    "1:30",
    "-1:30",
    "1e3",
    "1E5",
    "+1",
    "-0",
    ".5",
    "5.",
    "1.",
    ".inf",
    "-.Inf",
    ".nan",
    "1e-5",
    "2020-01-01",
    "2020-01-01 10:00:00",
    "<<",
    "=",
    "-",
    "--- a",
    "...",
    "? a",
    ": a",
    "a: b",
    "# a",
    "a # b",
    "&a",
    "*a",
    "!a",
    "%a",
    "@a",
    "`a`",
    "'",
    '"',
    "'a'",
    '"a"',
    "a'b\"c",
    "[a",
    "{a",
    "]",
    "}",
    ",",
    "a,b",
    "|",
    ">",
    " a",
    "a ",
    "  ",
    "a  b",
    "ä",
    "日本",
    "🙂",
    "\u2028",
    "a" * 500,
    "a " * 300,
    "\\n",
    "C:\\x",
]
odd_texts = st.sampled_from(ODD)
texts = st.one_of(odd_texts, st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=100))
scalars = st.one_of(
    texts, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.just(math.inf)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def as_typed(value: object) -> object:
    """Return a value that equals another one only if their types are equal too: 1, 1.0 and True are three."""
    if isinstance(value, dict):
        return {key: as_typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_typed(item) for item in value]
    return type(value), value


@given(values)
@example(dict.fromkeys(ODD, "x"))
@example(ODD)
def test_what_is_written_reads_back_as_the_same_value(value):
    assert as_typed(read_yaml(write_yaml(value))) == as_typed(value)


@given(values)
def test_a_reader_of_yaml_1_1_reads_the_same_value_from_what_is_written(value):
    assert as_typed(yaml.safe_load(write_yaml(value))) == as_typed(value)


@given(
    text=texts.filter(
        lambda text: text.strip() and text.isprintable() and len(text) <= LONGEST_TEXT
    )
)
@example(text="no")
@example(text="0o10")
@example(text="1e3")
def test_settings_of_any_text_are_written_and_read_again(tmp_path_factory, text):
    config = TrainConfig(data_dir=text, workload=text, optimizer=text, corrections=(text, "no"))
    file = tmp_path_factory.mktemp("settings") / "config.yaml"
    file.write_text(write_config(config), encoding="utf-8")
    assert load_config(TrainConfig, file=file, flags={}) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-010", -10),
        ("08", 8),
        ("0o10", 8),
        ("0x1f", 31),
        ("+7", 7),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
    ],
)
def test_numbers_booleans_and_null_are_those_of_yaml_1_2(text, value):
    assert as_typed(read_yaml(text)) == as_typed(value)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "Yes",
        "on",
        "OFF",
        "y",
        "1_000",
        "0b11",
        "1:30",
        "1:30.5",
        "2020-01-01",
        "tRUE",
        "nULL",
        "-0o7",
        "+0x1",
        "<<",
        "=",
        "e3",
        ".",
        "-",
        "+",
        "1e",
        "0o8",
        "0xg",
        "inf",
        "nan",
    ],
)
def test_what_only_yaml_1_1_takes_for_something_else_is_a_text(text):
    assert read_yaml(f"[{text}]" if text != "-" else "- '-'") == [text]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("epochs: 1\nseeds: 2\nepochs: 3\n", "'epochs' must appear once, got it in lines 1 and 3"),
        ("a:\n  b: 1\n  'b': 1\n", "'b' must appear once, got it in lines 2 and 3"),
        ("[{b: 1,\n b: 1}]", "'b' must appear once, got it in lines 1 and 2"),
        ("10: 1\n0xa: 2", "10 must appear once, got it in lines 1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text, lines):
    with pytest.raises(yaml.YAMLError, match=lines):
        read_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "!!bool yes",
        "!!int 0b1",
        "!!int 1_0",
        "!!float 1:30",
        "!!null no",
        "!!timestamp 2020-01-01",
        "!!binary YQ==",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!merge <<: {a: 1}",
        "!own 3",
        "? [1]",
        "!!map [1]",
        "!!seq 3",
        "!!str [1]",
        "!!python/name:os.system",
        "a: 1\n--- \nb: 1",
    ],
)
def test_what_the_core_schema_does_not_know_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


def read(tmp_path: Path, text: str, kind: type = TrainConfig):
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    return load_config(kind, file=tmp_path / "settings.yaml", flags={})


def test_no_and_none_are_the_settings_values_of_that_name(tmp_path):
    config = read(tmp_path, "mixed_precision: no\nnorm: none\ntracker: none\ndata_dir: no\n")
    assert (config.mixed_precision, config.norm, config.tracker, config.data_dir) == (
        "no",
        "none",
        "none",
        "no",
    )


def test_a_number_with_a_leading_zero_is_that_number(tmp_path):
    assert read(tmp_path, "epochs: 010\nseed: 0777\nlr: 01e-2\n").model_dump(
        include={"epochs", "seed", "lr"}
    ) == {"epochs": 10, "seed": 777, "lr": 0.01}


@pytest.mark.parametrize("word", ["false", "no", "off"])
def test_no_where_yes_or_no_is_asked_is_no(tmp_path, word):
    assert read(tmp_path, f"controls: {word}\n", CompareConfig).controls is False


def test_a_setting_that_stands_twice_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"'epochs' must appear once, got it in lines 1 and 3$"):
        read(tmp_path, "epochs: 1\nseed: 2\nepochs: 3\n")


def test_a_setting_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no setting named 3"):
        read(tmp_path, "3: 1\n")
