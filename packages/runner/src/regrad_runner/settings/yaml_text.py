"""YAML 1.2 by its core schema: `no` is text, `010` is ten, and no key occurs twice.

PyYAML reads YAML 1.1, in which `no` is False, `010` is eight, `1:30` is ninety, and the last of two
equal keys wins. Its scanner and parser suit both versions; this file defines what a plain word
means.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import BaseConstructor, ConstructorError
from yaml.nodes import MappingNode, ScalarNode

YAML_TAG = "tag:yaml.org,2002:"
NULL = re.compile(r"~|null|Null|NULL|")
TRUE = ("true", "True", "TRUE")
FALSE = ("false", "False", "FALSE")
BOOLEAN = re.compile("|".join((*TRUE, *FALSE)))
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# What a plain word is: the first pattern that matches all of it, and its possible first characters.
PLAIN_WORDS = (
    ("null", NULL, ["~", "n", "N", ""]),
    ("bool", BOOLEAN, list("tTfF")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
)


def read_yaml(text: str) -> Any:
    """Return what a document says; nothing in it is run.

    Raises:
        yaml.YAMLError: If it cannot be read, or has a key twice or a tag that is not in the core
            schema.
        ValueError: If a number has more digits than Python reads.
        RecursionError: If it is nested too deeply.

    Example:
        >>> read_yaml("{mixed_precision: no, epochs: 010, lr: 1e-3, when: 1:30}")
        {'mixed_precision': 'no', 'epochs': 10, 'lr': 0.001, 'when': '1:30'}
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader with fewer tags


def write_yaml(value: Any) -> str:
    """Return a document that `read_yaml` and readers of YAML 1.1 read as the same value.

    Args:
        value: Nested dictionaries and lists of texts, numbers, booleans and None.

    Example:
        >>> print(write_yaml({"norm": "no", "seed": "0o10", "lr": 1e-05}), end="")
        norm: 'no'
        seed: '0o10'
        lr: 1.0e-05
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Knows the plain words and the tags of the core schema, and no others."""

    # Instead of those of YAML 1.1. PyYAML's stubs take this for an instance variable.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping, or raise where a key stands twice."""
        if isinstance(node, MappingNode):
            self._refuse_repeated_keys(node)
        return BaseConstructor.construct_mapping(self, node, deep=deep)  # without merge keys

    def _refuse_repeated_keys(self, mapping: MappingNode) -> None:
        lines: dict[Any, int] = {}
        for node, _ in mapping.value:
            if not isinstance(node, ScalarNode):
                continue
            key = self.construct_object(node)
            line = node.start_mark.line + 1
            if key in lines:
                raise ConstructorError(
                    None, None, f"{key!r} must appear once, got it in lines {lines[key]} and {line}"
                )
            lines[key] = line

    def null(self, node: ScalarNode) -> None:
        """Read nothing."""
        self._matched(node, NULL)

    def boolean(self, node: ScalarNode) -> bool:
        """Read true or false."""
        return self._matched(node, BOOLEAN) in TRUE

    def integer(self, node: ScalarNode) -> int:
        """Read an integer: octal after 0o, hexadecimal after 0x, or decimal, with leading zeros."""
        text = self._matched(node, INTEGER)
        bases = {"0o": 8, "0x": 16}
        return int(text, bases.get(text[:2], 10))

    def real(self, node: ScalarNode) -> float:
        """Read a number with a point or an exponent."""
        text = self._matched(node, FLOAT).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def unknown(self, node: yaml.Node) -> None:
        """Refuse any other tag."""
        raise ConstructorError(None, None, f"the tag {node.tag!r} is unknown", node.start_mark)

    def _matched(self, node: ScalarNode, pattern: re.Pattern[str]) -> str:
        """Return a node's text, which a tag may have promised to be something that it is not."""
        text = str(self.construct_scalar(node))
        if not pattern.fullmatch(text):
            kind = node.tag.removeprefix(YAML_TAG)
            raise ConstructorError(None, None, f"{text!r} is no {kind}", node.start_mark)
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or YAML 1.2 would read as something else."""


for name, pattern, beginnings in PLAIN_WORDS:
    whole = re.compile(rf"(?:{pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"{YAML_TAG}{name}", whole, beginnings)
    _Dumper.add_implicit_resolver(f"{YAML_TAG}{name}", whole, beginnings)
for name, construct in (
    ("null", _Loader.null),
    ("bool", _Loader.boolean),
    ("int", _Loader.integer),
    ("float", _Loader.real),
    ("str", _Loader.construct_yaml_str),
    ("seq", _Loader.construct_yaml_seq),
    ("map", _Loader.construct_yaml_map),
):
    _Loader.add_constructor(f"{YAML_TAG}{name}", construct)
_Loader.add_constructor(None, _Loader.unknown)
