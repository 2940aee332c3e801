"""Names with options, such as "agc:max_ratio=0.02,axis=auto", read into Python values and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

FORM = "'name:option=value,option=value'"
WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
CLOSING = {"[": "]", "(": ")"}
BARE_WORD = re.compile(r"[\w.*/-]+")
CHARACTERS_SHOWN = 200  # characters of a long text that an error repeats


def read_spec(text: str, what: str = "options") -> tuple[str, dict[str, Any]]:
    """Split "name:option=value,option=value" into the name and its options.

    A value is a number, `true`, `false` or `none` in any case, a list in brackets or
    parentheses, or otherwise text. Quoted text may hold commas and brackets, and may look like a
    number. Spaces around names and values are ignored.

    Args:
        text: As the user typed it.
        what: What it names, as an error calls it.

    Returns:
        The name, and the options in their order. A list becomes a tuple. An option of a part is
        prefixed with the part's name: "gcw.prior".

    Raises:
        ValueError: If it is not of that form, an option is given twice, or a number is too large
            for a float; the message says what to write.

    Example:
        >>> read_spec("agc:max_ratio=1e-2,axis=auto")
        ('agc', {'max_ratio': 0.01, 'axis': 'auto'})
        >>> read_spec("gcgd:gcw.layers=[head, 'blocks[0]'],gcw.prior=none")
        ('gcgd', {'gcw.layers': ('head', 'blocks[0]'), 'gcw.prior': None})
    """
    name, _, options = text.partition(":")
    return name.strip(), _Reader(options, text, what).options()


def write_spec(name: str, options: Mapping[str, Any]) -> str:
    """Return "name:option=value,option=value", which `read_spec` reads back.

    Args:
        name: What has the options.
        options: Numbers, truth values, None, texts, and tuples or lists of these. A list is read
            back as a tuple.

    Returns:
        The text; the name alone where there is no option.

    Raises:
        TypeError: If a value is of another type, such as a list in a list.
        ValueError: If a text has both kinds of quotes.

    Example:
        >>> write_spec("agc", {"max_ratio": 0.01, "exclude": ("head", "blocks[0]"), "axis": "1"})
        "agc:max_ratio=0.01,exclude=[head,'blocks[0]'],axis='1'"
        >>> write_spec("agc", {})
        'agc'
    """
    if not options:
        return name
    told = ",".join(f"{option}={_written(option, value)}" for option, value in options.items())
    return f"{name}:{told}"


def _written(option: str, value: Any) -> str:
    """Return one value as `read_spec` reads it."""
    if isinstance(value, tuple | list):
        return f"[{','.join(_written_item(option, item) for item in value)}]"
    return _written_item(option, value)


def _written_item(option: str, value: Any) -> str:
    """Return a value that is no list as `read_spec` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if not isinstance(value, str):
        raise TypeError(
            f"{option} must be a number, a text, true, false, none or a list of these to be "
            f"written as text, got {value!r}; pass the correction itself instead"
        )
    is_read_as_text = value.lower() not in WORDS and _number(value) is None
    if is_read_as_text and BARE_WORD.fullmatch(value):
        return value
    for quote in "'\"":
        if quote not in value:
            return f"{quote}{value}{quote}"
    raise ValueError(
        f"{option} must be without one kind of quotes to be written as text, got {value!r}; pass "
        "the correction itself instead"
    )


class _Reader:
    """Reads options from left to right.

    Args:
        text: What stands behind the name and its colon.
        whole: What the user typed, for errors.
        what: What it names, for errors.
    """

    def __init__(self, text: str, whole: str, what: str) -> None:
        self._left = text.strip()
        self._shown = (
            repr(whole) if len(whole) <= CHARACTERS_SHOWN else f"{whole[:CHARACTERS_SHOWN]!r}…"
        )
        self._what = what

    def options(self) -> dict[str, Any]:
        """Read "option=value,option=value" to the end."""
        options: dict[str, Any] = {}
        if not self._left:
            return options
        while True:
            name = self._name()
            if name in options:
                raise ValueError(
                    f"option {name!r} must be given once, got {self._shown}; remove all but one"
                )
            options[name] = self._value(name)
            if not self._left:
                return options
            if self._take(",") is None:
                raise self._refusal(
                    f"put a comma before {self._left[:20]!r}, or quotes around the whole text"
                )

    def _name(self) -> str:
        """Read "option=", where the name may have several parts with dots between them."""
        item = self._take(r"[^,=]*") or ""
        if self._take("=") is None:
            if not item:
                raise self._refusal("remove the extra comma")
            raise self._refusal(f"give {item!r} a value, or put quotes around text with commas")
        if not all(part.strip() for part in item.split(".")):
            raise self._refusal("write the option's name before '='")
        return item

    def _value(self, name: str) -> Any:
        """Read a list, a text in quotes, or what stands before the next comma."""
        opening = self._take(r"[\[(]")
        if opening is not None:
            return self._list(CLOSING[opening])
        value = self._quoted()
        if value is not None:
            return value
        word = self._take(r"[^,]+")
        if word is None:
            raise self._refusal(f"give {name!r} a value; '' is empty text")
        return self._plain(word)

    def _list(self, closing: str) -> tuple[Any, ...]:
        """Read the rest of a list, whose opening bracket was taken."""
        items: list[Any] = []
        while self._take(re.escape(closing)) is None:
            items.append(self._item(closing))
            if self._take(",") is None and not self._left.startswith(closing):
                raise self._refusal(f"close the list with {closing!r}")
        return tuple(items)

    def _item(self, closing: str) -> Any:
        """Read one value of a list."""
        value = self._quoted()
        if value is not None:
            return value
        word = self._take(r"[^,\[\]()]+")
        if word is not None:
            return self._plain(word)
        if not self._left:
            raise self._refusal(f"close the list with {closing!r}")
        raise self._refusal("put numbers, words or quoted text between the commas of a list")

    def _quoted(self) -> str | None:
        """Read a text in quotes; None if there is none."""
        if self._left[:1] not in {"'", '"'}:
            return None
        text = self._take(r"'[^']*'|\"[^\"]*\"")
        if text is None:
            raise self._refusal("close the quotes")
        return text[1:-1]

    def _plain(self, word: str) -> Any:
        """Return the number, truth value or None that a word stands for, or else the word."""
        if word.lower() in WORDS:
            return WORDS[word.lower()]
        number = _number(word)
        if number is None:
            return word
        if isinstance(number, float) and math.isinf(number) and "inf" not in word.lower():
            raise ValueError(f"numbers must fit a float, got {word[:20]!r} in {self._shown}")
        return number

    def _take(self, pattern: str) -> str | None:
        """Take what matches off the front, and the spaces around it; None if nothing matches."""
        found = re.match(pattern, self._left)
        if found is None:
            return None
        self._left = self._left[found.end() :].lstrip()
        return found[0].rstrip()

    def _refusal(self, mend: str) -> ValueError:
        return ValueError(f"{self._what} must look like {FORM}, got {self._shown}; {mend}")


def _number(word: str) -> int | float | None:
    """Return the number that Python reads in a word, or None."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return None
