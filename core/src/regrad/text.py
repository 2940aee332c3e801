"""Make text that others wrote safe to show."""

import unicodedata

# Control, format (text direction, zero width), surrogate, private and unassigned characters, line
# and paragraph separators: a terminal obeys them, hides them, or cannot write them.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, *, keep: str = "") -> str:
    r"""Return text without control sequences, with escapes for what cannot be seen.

    For what a third party wrote: metadata, names, the texts of exceptions and warnings.

    Args:
        text: The text, or an object that is shown by its `str`.
        keep: Characters to leave as they are, such as "\n" in a paragraph.

    Example:
        >>> print(printable("plain, ηλθ, \x1b[31mred"))
        plain, ηλθ, \x1b[31mred
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(_shown(letter, keep) for letter in plain)


def _shown(letter: str, keep: str) -> str:
    if letter in keep or unicodedata.category(letter) not in UNSEEN:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
