import io

import pytest
from regrad_runner.reporting.progress import Display
from rich.console import Console


def shown(*, terminal, quiet=False):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80, legacy_windows=False)
    with Display(console, runs=12, quiet=quiet) as display:
        display.say("12 runs of [baseline]")
        display.begin("baseline, seed 0", steps=320)
        display.step(40)
        display.note("step 40: loss 0.1")
        display.end("baseline, seed 0: 0.98")
    return text.getvalue()


def test_where_there_is_no_terminal_every_run_is_one_plain_line():
    assert shown(terminal=False).splitlines() == [
        "12 runs of [baseline]",
        "step 40: loss 0.1",
        "[ 1/12] baseline, seed 0: 0.98",
    ]


def test_a_terminal_shows_bars_and_no_line_per_run():
    text = shown(terminal=True)
    assert "all runs" in text
    assert "12 runs of [baseline]" in text
    assert "[ 1/12]" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_process_that_does_not_report_shows_nothing(terminal):
    assert shown(terminal=terminal, quiet=True) == ""
