"""Where the commands print, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from regrad.text import printable
from rich import box
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from regrad_runner.errors import KEPT_CHARACTERS


class Terminal(Console):
    r"""A console that shows any text literally, whoever wrote it.

    Names, summaries, notes and errors come from plugins, from metadata and from files. What is in
    them must not move the cursor, colour the screen or turn the direction of text: it is shown
    escaped. Our own colours and movements are not text to rich, and pass.

    Example:
        >>> Terminal(color_system=None).print("plain \x1b[31mred")
        plain \x1b[31mred
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text to be measured and laid out, in which escapes have their width."""
        return super().render_str(printable(text, keep=KEPT_CHARACTERS), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Return the pieces to write."""
        for piece in super().render(renderable, options):
            if piece.control:
                yield piece
            else:
                yield Segment(printable(piece.text, keep=KEPT_CHARACTERS), piece.style)

    def print_line(self, text: str, *, style: str | None = None, wrap: bool = False) -> None:
        """Print a text without markup or highlighting.

        Args:
            text: What to print.
            style: Colour or weight of all of it.
            wrap: Whether a terminal breaks it between words; by default it is one line, whole for
                whoever copies it. If the console is not a terminal nothing is broken.
        """
        is_whole = not (wrap and self.is_terminal)
        self.print(text, style=style, highlight=False, markup=False, soft_wrap=is_whole)


def plain_table(
    headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, ruled: bool = False
) -> Table:
    r"""Return a table without a frame, whose cells are folded rather than cut off.

    Args:
        headings: One per column; none for a table without a head.
        rows: One cell per column. A string is shown as it is, with control characters as their
            escapes; a `Text` keeps its style.
        ruled: Draw a line under the head.

    Example:
        >>> table = plain_table(("name", "kind"), [("agc", "correction"), ("[b]", "\x1b")])
        >>> Console(color_system=None).print(table)
        name  kind
        agc   correction
        [b]   \x1b
    """
    table = Table(
        box=box.SIMPLE_HEAD if ruled else None,
        padding=(0, 1, 0, 0) if ruled else (0, 1),
        pad_edge=False,
        show_edge=not ruled,
        show_header=bool(headings),
        header_style="bold",
    )
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(_cell(content) for content in row))
    for column in table.columns:
        column.overflow = "fold"
    return table


def _cell(content: str | Text) -> Text:
    if isinstance(content, Text):
        return content
    return Text(printable(content))
