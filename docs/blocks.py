"""Find the code that stands on the pages, fenced and indented, with where it stands.

Usage: python docs/blocks.py
Gives every block of shell commands to shellcheck; what it finds is an error. The tests
run or parse the blocks.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "*/README.md", "p*/*/README.md", "docs/**/*.md")
SHELL, CLUSTER = "bash", "cluster"


@dataclass(frozen=True)
class Block:
    """One block of a page: its language, the marks behind that, such as "cluster", and its text."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        """Where it stands, as an editor opens it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return every page of the repository."""
    found: set[Path] = set()
    for pattern in PATTERNS:
        found |= {*ROOT.glob(pattern)}
    return sorted(path for path in found if "_build" not in path.parts)


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order.

    What is indented, or fenced without a language, is for the shell.
    """
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in {"fence", "code_block"} and token.map:
            language, *marks = token.info.split() or [SHELL]
            found.append(Block(page, token.map[0] + 1, language, tuple(marks), token.content))
    return found


def all_blocks() -> list[Block]:
    """Return the blocks of every page."""
    found = []
    for page in pages():
        found += blocks(page)
    return found


def shellcheck(shell_blocks: Iterable[Block]) -> str:
    """Return what shellcheck says of some blocks, each by its place; nothing where all is well."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, block in enumerate(shell_blocks):
            path = Path(folder) / f"{number}.sh"
            path.write_text("\n" * (block.line - 1) + block.text, encoding="utf-8")
            files[path.name] = str(block.page.relative_to(ROOT))
        command = ["shellcheck", "--shell=bash", "--format=gcc", *sorted(files)]
        done = subprocess.run(  # noqa: S603
            command, cwd=folder, capture_output=True, text=True, check=False
        )
    return re.sub(
        r"^\d+\.sh", lambda found: files[found[0]], done.stdout + done.stderr, flags=re.MULTILINE
    )


if __name__ == "__main__":
    sys.exit(shellcheck(block for block in all_blocks() if block.language == SHELL) or None)
