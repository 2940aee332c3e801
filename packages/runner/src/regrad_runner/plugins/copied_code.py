"""The code of an installed plugin under other names, without its docstrings and comments."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

BLANK_DOCSTRING = '"""(fill in)"""'
PRAGMA = re.compile(r"#\s*(noqa|type:|pragma:)")


class Edit(NamedTuple):
    """A part of a text, and what comes in its place."""

    start: int
    end: int
    text: str


def without_prose(source: str) -> str:
    """Return Python code with blank docstrings and no comments: they describe the original.

    Example:
        >>> without_prose("pass  # as Someone and Other, 2020, have it")
        'pass'
    """
    starts = _line_starts(source)
    edits = [_blank(source, starts, docstring) for docstring in _docstrings(ast.parse(source))]
    edits += [
        _without_comment(source, starts, token)
        for token in _tokens(source)
        if token.type == tokenize.COMMENT and not PRAGMA.match(token.string)
    ]
    return _edited(source, edits)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Return the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        text = first.value if isinstance(first, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield text


def _without_comment(source: str, starts: list[int], token: tokenize.TokenInfo) -> Edit:
    """Return the edit that takes out a comment, with its line where it stands alone."""
    line, column = token.start
    line_start = starts[line - 1]
    before = source[line_start : line_start + column]
    if before.strip():
        return Edit(line_start + len(before.rstrip()), line_start + token.end[1], "")
    return Edit(line_start, starts[line], "")


def renamed(source: str, names: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Return Python code with other names.

    Args:
        source: Without prose, so that every string belongs to the code, such as an error's text.
        names: New identifiers by old ones.
        words: What to write in strings, by the pattern of what stands there.

    Example:
        >>> renamed('Old("old:a=1")', {"Old": "New"}, {"old": "new"})
        'New("new:a=1")'
    """
    starts = _line_starts(source)
    edits = []
    for token in _tokens(source):
        new = _renamed_token(token, names, words)
        if new != token.string:
            edits.append(Edit(_place(starts, token.start), _place(starts, token.end), new))
    return _edited(source, edits)


def _renamed_token(
    token: tokenize.TokenInfo, names: Mapping[str, str], words: Mapping[str, str]
) -> str:
    """Return what to write for a token: names change in code, words in strings."""
    text = token.string
    if token.type == tokenize.NAME:
        return names.get(text, text)
    if token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
        for pattern, word in words.items():
            text = re.sub(pattern, word, text)
    return text


def _place(starts: list[int], position: tuple[int, int]) -> int:
    """Return where a position, a line counted from 1 and a column, is in the text."""
    line, column = position
    return starts[line - 1] + column


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def _line_starts(source: str) -> list[int]:
    """Return where each line starts."""
    return [0, *accumulate(map(len, source.splitlines(keepends=True)))]


def _blank(source: str, starts: list[int], node: ast.Constant) -> Edit:
    """Return the edit that blanks a docstring; its columns count bytes."""
    lines = source.splitlines(keepends=True)

    def place(line: int, column: int) -> int:
        before = lines[line - 1].encode()[:column]
        return starts[line - 1] + len(before.decode())

    start = place(node.lineno, node.col_offset)
    return Edit(start, place(node.end_lineno or 0, node.end_col_offset or 0), BLANK_DOCSTRING)


def _edited(source: str, edits: list[Edit]) -> str:
    """Return a text with edits made, none inside another."""
    pieces = []
    end = 0
    for edit in sorted(edits):
        pieces += [source[end : edit.start], edit.text]
        end = edit.end
    return "".join([*pieces, source[end:]])
