"""Record a real comparison in a terminal: `python docs/recording.py`.

Runs the command below in a pseudo terminal, some minutes on two cores, and writes what
the terminal showed to `docs/_static/recording.svg`: a few moments of the progress, then
the result. The picture plays once, loads nothing and needs no script.
"""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import tempfile
import termios
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).parent / "_static" / "recording.svg"
COMMAND = "regrad compare --corrections xgrad centralization --seeds 6 --epochs 6 --out comparison"
COLUMNS, ROWS = 100, 40
MOMENTS = 5  # of the progress, before the result
SECONDS = 0.5  # that each of them is shown
CHARACTER, LINE, MARGIN = 8.0, 18, 16  # width and height in pixels
BACKGROUND, FOREGROUND = "#161b22", "#e6edf3"
ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r\n|\r|\n")
STYLE = f"""
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; }}
.moment {{ visibility: hidden; animation: shown {SECONDS}s; }}
.result {{ animation: hidden {(MOMENTS + 1) * SECONDS}s; }}
@keyframes shown {{ from, to {{ visibility: visible; }} }}
@keyframes hidden {{ from, to {{ visibility: hidden; }} }}
@media (prefers-reduced-motion: reduce) {{ .moment, .result {{ animation: none; }} }}
"""


class Screen:
    """The lines that a terminal shows, for what rich's progress and tables write to it."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = 0

    def feed(self, text: str) -> None:
        """Show more text."""
        place = 0
        for found in ESCAPE.finditer(text):
            self.lines[self.row] += text[place : found.start()]
            self._obey(found)
            place = found.end()
        self.lines[self.row] += text[place:]

    def _obey(self, found: re.Match[str]) -> None:
        code, letter = found[1], found[2]
        if found[0] in ("\n", "\r\n"):
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif letter == "A":
            self.row = max(0, self.row - int(code or 1))
        elif letter == "K":
            self.lines[self.row] = ""
        elif letter == "m":
            self.lines[self.row] += found[0]


def shown_by(command: str) -> Iterator[list[str]]:
    """Run a command in a pseudo terminal and yield the lines on the screen, again and again."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen = Screen()
    screen.feed(f"\x1b[32m$\x1b[0m {command}\r\n")
    yield list(screen.lines)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(  # noqa: S603
            shlex.split(command), cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        waiting = b""
        while chunk := read(ours):
            text, waiting = decoded(waiting + chunk)
            screen.feed(text)
            yield list(screen.lines)
        if process.wait():
            raise RuntimeError(f"{command} ended with exit code {process.returncode}")


def read(terminal: int) -> bytes:
    """Return what a terminal has next; nothing once its program has ended."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def decoded(data: bytes) -> tuple[str, bytes]:
    """Return the whole characters in some bytes, and the bytes of one that has only begun."""
    for kept in range(4):
        whole = data[: len(data) - kept]
        try:
            return whole.decode("utf-8"), data[len(whole) :]
        except UnicodeDecodeError:
            continue
    raise ValueError("the command wrote something that is not UTF-8")


def moments(screens: list[list[str]]) -> list[list[str]]:
    """Return the command, a few screens with progress evenly over the time, and the last one."""
    busy = [screen for screen in screens if any("all runs" in line for line in screen)]
    picked = [busy[number * len(busy) // MOMENTS] for number in range(MOMENTS)]
    return [screens[0], *picked, screens[-1]]


def drawn(screen: list[str]) -> str:
    """Return one screen as text elements, a piece of one colour each at its column."""
    console = Console(width=COLUMNS, color_system="truecolor")
    pieces = []
    for row, line in enumerate(screen):
        column = 0
        for segment in Text.from_ansi(line).render(console):
            if segment.text.strip():
                pieces.append(piece(segment.text, segment.style or Style(), column, row))
            column += segment.cell_length
    return "\n".join(pieces)


def piece(text: str, style: Style, column: int, row: int) -> str:
    """Return a text element that is as wide in every font."""
    left = len(text) - len(text.lstrip())
    shown = text.strip()
    colour = FOREGROUND if style.color is None else style.color.get_truecolor(MONOKAI).hex
    bold = ' font-weight="bold"' if style.bold else ""
    x = MARGIN + (column + left) * CHARACTER
    y = MARGIN + (row + 1) * LINE - 5
    width = len(shown) * CHARACTER
    place = f'x="{x:g}" y="{y:g}" textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'
    return f'<text {place} fill="{colour}"{bold}>{escape(shown)}</text>'


def picture(shown: list[list[str]]) -> str:
    """Return the moments, one after the other, as an SVG file."""
    *early, result = shown
    width = COLUMNS * CHARACTER + 2 * MARGIN
    height = max(len(screen) for screen in shown) * LINE + 2 * MARGIN
    groups = []
    for number, screen in enumerate(early):
        delay = f"animation-delay: {number * SECONDS:g}s"
        groups.append(f'<g class="moment" style="{delay}">\n{drawn(screen)}\n</g>')
    groups.append(f'<g class="result">\n{drawn(result)}\n</g>')
    body = "\n".join(groups)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">\n'
        f"<title>A terminal that runs regrad compare</title>\n<desc>{escape(COMMAND)}</desc>\n"
        f"<style>{STYLE}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>\n{body}\n</svg>\n'
    )


def trimmed(screen: list[str]) -> list[str]:
    """Return a screen without empty lines at its end."""
    lines = [line.rstrip() for line in screen]
    while lines and not lines[-1]:
        lines.pop()
    return lines


if __name__ == "__main__":
    seen = [trimmed(screen) for screen in shown_by(COMMAND)]
    PICTURE.write_text(picture(moments(seen)), encoding="utf-8")
