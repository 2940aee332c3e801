"""What `regrad compare` says of a script that cannot be compared as asked; nothing is started."""

import pytest
from regrad_runner.cli.main import main

LOSS = "--measure x=(a) --lower-is-better"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("agc", "got 'agc'; corrections go after --corrections, such as --corrections agc"),
        ("--corrections agc train.py", "script must come after '--', got 'train.py' among the"),
        (f"{LOSS} train.py --no {{seed}}", "go after '--': -- train.py ..."),
        (f"{LOSS} --corrections -- train.py", "between --corrections and '--', got none"),
        (f"{LOSS} -- none.py {{seed}}", "script must be a file, got 'none.py'; give its path"),
        (f"{LOSS} -- python train.py", "script must be given without 'python'"),
        ("-- train.py {seed}", "--measure must be given with a script, such as --measure '"),
        (
            "--measure x=(a) -- train.py {seed}",
            "--higher-is-better or --lower-is-better must be given with --measure, got neither",
        ),
        (
            f"{LOSS} --higher-is-better -- train.py {{seed}}",
            "--higher-is-better must be given without --lower-is-better",
        ),
        (f"{LOSS} --model gpt -- train.py {{seed}}", "--model must be left out with a script"),
        ("--measure x=(a)", "--measure must be given with a script of your own after '--'"),
        ("--lower-is-better", "--lower-is-better must be given with a script of your own"),
        ("--launcher x", "--launcher must be given with a script of your own after '--'"),
        (f"{LOSS} --measure x=(a -- train.py {{seed}}", "measure must have a regular expression"),
        (f"{LOSS} --measure x=a -- train.py {{seed}}", "for the value, got 0 in 'a'; write (?:"),
        (f"{LOSS} --measure x=(a)(b) -- train.py {{seed}}", "for the value, got 2 in '(a)(b)'"),
        (f"{LOSS} -- train.py", "script must take {seed} in its arguments, got none; add it"),
        (f"{LOSS} -- train.py {{seed}} {{lr}}", "lr must be given when the script takes {lr}"),
        (f"{LOSS} --lr 0.1 -- train.py {{seed}}", "script must take {lr} in its arguments"),
        (f"{LOSS} --lr auto -- train.py {{seed}}", "lr must be numbers for a script, got 'auto'"),
        (
            "--measure x=json:m:k --lower-is-better -- train.py {seed}",
            "script must take {out} when --measure reads a file, got 'm'; runs would write to",
        ),
        (
            "--measure x=csv:m:k --lower-is-better -- train.py {seed}",
            "script must take {out} when --measure reads a file",
        ),
        (
            "--measure x=mlflow:k --lower-is-better --tracker none -- train.py {seed}",
            "measure must not come from MLflow with --tracker none, got 'x=mlflow:k'; leave out",
        ),
        (f"{LOSS} --launcher 'a -- train.py {{seed}}", "launcher must be words as a shell reads"),
        (f"{LOSS} --timeout 0 -- train.py {{seed}}", "timeout must be greater than 0, got 0.0"),
        (f"{LOSS} --target nan -- train.py {{seed}}", "target must be a finite number, got 'nan'"),
        (f"{LOSS} --seeds 9999999 -- train.py {{seed}}", "seeds must be less than or equal to"),
        (f"{LOSS} --corrections nope -- train.py {{seed}}", "no correction named 'nope'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(here, capsys, words, said):
    before = sorted(here.iterdir())
    assert main(["compare", "--out", "out", *words.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("regrad: ")
    assert told.count("\n") == 1
    assert said in told
    assert sorted(here.iterdir()) == before


def test_the_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.replace("│", " ").split())
    for flag in ("--measure", "--launcher", "--timeout", "--seed-by-run", "--lower-is-better"):
        assert flag in words
    assert "[-- SCRIPT ARGS...]" in words
