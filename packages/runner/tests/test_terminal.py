import io

import pytest
from regrad_runner.terminal import Terminal
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def shown(*things, terminal=False, **options):
    console = Terminal(file=io.StringIO(), width=60, force_terminal=terminal, **options)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_others_stands_as_its_escape_in_every_form(terminal):
    odd = "\x1b[31mred \u202e\x9b2J"
    table = Table("head")
    table.add_row(odd)
    for thing in (odd, Text(odd), table, [odd]):
        text = shown(thing, terminal=terminal, color_system=None)
        assert r"\x1b[31mred \u202e\x9b2J" in text
        assert "\x1b[31m" not in text
        assert not {"\u202e", "\x9b"} & set(text)


def test_colours_of_our_own_pass():
    assert "\x1b[1;31mwrong" in shown("[bold red]wrong[/]", terminal=True, color_system="standard")


def test_a_line_that_is_printed_as_it_is_is_no_exception():
    console = Terminal(file=io.StringIO(), force_terminal=False)
    console.out("a b\n\x1b[0m", highlight=False)
    assert console.file.getvalue() == "a b\n\\x1b[0m\n"


def test_bars_move_the_cursor_and_their_descriptions_do_not():
    console = Terminal(file=io.StringIO(), force_terminal=True, color_system=None, width=60)
    with Progress(console=console) as bars:
        bars.add_task("odd\x1b[5A")
    assert r"odd\x1" in console.file.getvalue()  # cut, where the bar needs the place
    assert "\x1b[5A" not in console.file.getvalue()
    assert "\x1b[" in console.file.getvalue()
