"""Settings of a comparison of a script."""

import pytest
from pydantic import ValidationError
from regrad_runner.settings.config import CompareConfig
from regrad_runner.settings.script_config import (
    NO_RATE,
    ScriptConfig,
    comparison_settings_of,
    filled_in,
)


def settings(*script, **more):
    known = {"measure": "loss=loss ([0-9.]+)", "better": "lower", **more}
    return ScriptConfig(script=script or ("train.py", "{seed}"), **known)


def test_words_in_braces_are_filled_in_and_others_stay():
    text = "{'a': 1} {seed}{lr} {out}/{x} {{arm}}"
    values = {"seed": "3", "lr": "0.1", "out": "/o", "arm": "xgrad"}
    assert filled_in(text, values) == "{'a': 1} 30.1 /o/{x} {xgrad}"
    assert filled_in("{seed} {lr}", {"seed": "{lr}", "lr": "1"}) == "{lr} 1"


def test_a_script_without_a_rate_has_one_rate_that_nobody_chooses():
    assert settings().rates == (NO_RATE,)
    assert settings("train.py", "{seed}", "{lr}", lr=[0.1, 0.2]).rates == (0.1, 0.2)


def test_a_file_with_out_in_its_own_name_needs_none_in_the_script():
    assert settings(measure="loss=json:{out}/m.json:loss").source.file == "{out}/m.json"


def test_without_a_seed_the_run_must_seed():
    with pytest.raises(ValidationError, match=r"script must take \{seed\} in its arguments"):
        settings("train.py")
    assert settings("train.py", seed_by_run=True).placeholders == set()


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (("a/train.py", "{seed}"), "train"),
        (("-m", "package.train", "{seed}"), "package.train"),
        (("-m", "{seed}"), "{seed}"),
    ],
)
def test_a_script_is_called_by_its_file_or_module(script, name):
    assert settings(*script).script_name == name


@pytest.mark.parametrize("better", ["more", None])
def test_the_direction_must_be_said(better):
    with pytest.raises(ValidationError, match="better"):
        settings(better=better)


def test_a_file_of_settings_is_of_a_script_where_it_names_one():
    assert comparison_settings_of({"script": ["train.py"]}) is ScriptConfig
    assert comparison_settings_of({"workload": "digits"}) is CompareConfig
