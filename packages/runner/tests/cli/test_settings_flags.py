"""Flags made from settings: what a command is given, and what becomes of it."""

import inspect

import pytest
from regrad_runner.cli.settings_flags import given_settings, load_settings, takes_settings
from regrad_runner.settings.config import CompareConfig, RunConfig, TrainConfig


def parameters(kind, *names):
    @takes_settings(kind, names=names)
    def command(given, *, json: bool = False):
        return given, json

    return command, inspect.signature(command).parameters


@pytest.mark.parametrize("kind", [CompareConfig, TrainConfig])
def test_every_setting_has_one_flag_and_those_of_the_kind_come_first(kind):
    _, flags = parameters(kind)
    names = [name.removeprefix("no_") for name in flags]
    own = [name for name in kind.model_fields if name not in RunConfig.model_fields]
    assert names == [*own, *RunConfig.model_fields, "json"]


def test_a_command_may_take_some_settings_in_an_order_of_its_own():
    _, flags = parameters(TrainConfig, "lr", "corrections")
    assert list(flags) == ["lr", "corrections", "json"]


def test_a_command_is_given_the_settings_that_were_typed_and_its_own_flags():
    command, flags = parameters(CompareConfig)
    values = {name: flag.default for name, flag in flags.items()}
    values |= {"corrections": [], "seeds": 3, "json": True}
    assert command(**values) == ({"seeds": 3}, True)


def test_a_flag_that_turns_a_setting_off_and_several_rates_become_settings():
    given = given_settings(
        CompareConfig.model_fields, {"no_controls": True, "lr": "0.1,0.2", "seeds": None}
    )
    assert given == {"controls": False, "lr": ["0.1", "0.2"]}
    assert load_settings(CompareConfig, given).lr == (0.1, 0.2)


def test_nothing_is_resumed_without_a_folder_that_was_begun(tmp_path):
    with pytest.raises(ValueError, match="out must be given with --resume"):
        load_settings(TrainConfig, {}, resume=True)
    with pytest.raises(ValueError, match=r"config\.yaml; start it again without --resume"):
        load_settings(TrainConfig, {}, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"without config\.yaml$"):
        load_settings(TrainConfig, {}, out=tmp_path / "none", resume=True)


def test_a_name_that_no_file_system_takes_is_refused_in_short(tmp_path):
    with pytest.raises(ValueError, match=r"out must be a folder, got .*…'.*; choose another name"):
        load_settings(TrainConfig, {}, out=tmp_path / ("a" * 5000))
