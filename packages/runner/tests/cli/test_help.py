"""The help of every command: all of it is there at 80 columns, and it says the defaults that the settings have."""

import re

import pytest
from regrad_runner.cli.app import app
from regrad_runner.cli.main import main
from regrad_runner.settings.config import CompareConfig, TrainConfig
from typer.main import get_command


def found_commands() -> dict:
    """Every command and group by the words that lead to it."""
    waiting, found = [("", get_command(app))], {}
    while waiting:
        words, command = waiting.pop()
        found[words] = command
        waiting += [
            (f"{words} {name}".strip(), child)
            for name, child in getattr(command, "commands", {}).items()
        ]
    return found


COMMANDS = found_commands()


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What `regrad WORDS --help` prints on a terminal of a given width."""

    def printed(words: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)
        assert main([*words.split(), "--help"]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return printed


def words_of(text: str) -> list[str]:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text).split()


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words or "regrad")
def test_help_fits_80_columns_and_nothing_is_cut(help_of, words):
    text, command = help_of(words), COMMANDS[words]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("--")]
    assert [option.opts[0] for option in options if option.opts[0] not in words_of(text)] == []
    shown = " ".join(words_of(text))
    helps = [parameter.help for parameter in command.params] + [command.help, command.epilog]
    columns = [[word for word in words_of(part) if word not in words_of(text)] for part in helps]
    assert not any(columns), "a word of a help text is missing or torn apart"
    assert " ".join(words_of(command.epilog)) in shown, "an example is torn apart"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words or "regrad")
def test_every_option_and_command_says_what_it_is(words):
    command = COMMANDS[words]
    assert [parameter.name for parameter in command.params if not parameter.help] == []
    assert command.help
    assert command.epilog.startswith("Examples:\n\nregrad")


@pytest.mark.parametrize(("words", "kind"), [("compare", CompareConfig), ("train", TrainConfig)])
def test_help_names_the_default_of_every_setting_that_has_one(words, kind):
    helps = {parameter.name: parameter.help for parameter in COMMANDS[words].params}
    defaults = {name: field.default for name, field in kind.model_fields.items() if name in helps}
    assert len(defaults) > 15
    plain = {
        name: value
        for name, value in defaults.items()
        if value is not None and not isinstance(value, bool | tuple)
    }
    assert len(plain) > 5
    wrong = [
        name
        for name, value in plain.items()
        if f"{value} by default" not in helps[name] and f"{value} (the default)" not in helps[name]
    ]
    assert wrong == []


def test_without_words_the_help_of_all_is_shown(help_of, capsys):
    text = help_of("")
    assert main([]) == 0
    assert capsys.readouterr().out == text
    assert [name for name in get_command(app).commands if name not in text] == []
