"""Where the commands print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regrad.text import printable
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from regrad_runner.errors import KEPT_CHARACTERS


class Terminal(Console):
    r"""A console that shows text as text, whoever wrote it.

    Names, summaries, notes and errors come from plugins, from metadata and from files. What is in
    them must not move the cursor, colour the screen or turn the direction of text: it stands as its
    escape. Colours and movements of our own are no text to rich, and pass.

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
