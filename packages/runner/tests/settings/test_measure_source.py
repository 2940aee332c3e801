"""What `--measure` asks for."""

import re

import pytest
from regrad_runner.settings.measure_source import read_measure_source, value_group


@pytest.mark.parametrize(
    ("text", "name", "kind", "key", "file"),
    [
        ("val loss=a=b ([0-9.]+)", "val loss", "output", "a=b ([0-9.]+)", ""),
        ("loss=mlflow:eval/loss:0", "loss", "mlflow", "eval/loss:0", ""),
        ("loss=json:C:/out/m.json:eval.loss", "loss", "json", "eval.loss", "C:/out/m.json"),
        (" acc =csv:{out}/*.csv:val acc", "acc", "csv", "val acc", "{out}/*.csv"),
    ],
)
def test_sources_are_told_apart(text, name, kind, key, file):
    source = read_measure_source(text)
    assert (source.name, source.kind, source.key, source.file) == (name, kind, key, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss", "measure must be NAME=REGEX"),
        ("=loss (.*)", "measure must be NAME=REGEX"),
        ("loss=", "measure must be NAME=REGEX"),
        ("loss=mlflow:", "measure must name a metric after 'mlflow:'"),
        ("loss=json:file", "measure must be NAME=json:FILE:KEY"),
        ("loss=csv::x", "measure must be NAME=csv:FILE:COLUMN"),
        ("loss=loss ([0-9", "measure must have a regular expression after '='"),
        ("loss=loss [0-9]+", "one group in parentheses, for the value, got 0"),
        ("loss=(a) (b)", "one group in parentheses, for the value, got 2"),
        ("loss=(?P<step>a)", "one group in parentheses, for the value, got 0"),
    ],
)
def test_what_is_none_of_them_is_refused_with_the_rule_and_the_value(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        read_measure_source(text)
    assert any(repr(part) in str(problem.value) for part in (text, text.partition("=")[2]))


def test_the_group_of_the_value_is_the_one_that_is_not_the_step():
    assert value_group(re.compile("(a) (?P<step>b)")) == 1
    assert value_group(re.compile("(?P<step>a) (b)")) == 2
