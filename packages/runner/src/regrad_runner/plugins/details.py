"""What an installed plugin says about itself in metadata, docstrings and declarations."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from email.message import Message
from typing import Any

import docstring_parser
import regrad
import torch
from docstring_parser.google import DEFAULT_SECTIONS, GoogleParser, Section, SectionType
from regrad.correction import Control, Correction, did_you_mean
from regrad.distributions import find
from regrad.errors import PluginLoadError
from regrad.registry import GROUPS, Entry
from regrad.text import printable
from rich.table import Table
from rich.text import Text

from regrad_runner.errors import KEPT_CHARACTERS
from regrad_runner.settings.arms import control_as_values, control_of_stack
from regrad_runner.terminal import Terminal, plain_table

NOT_OPTIONS = {"self", "params"}
FACTS = {  # a correction's declarations, in words
    "stages": "acts on",
    "reads": "reads",
    "layouts": "exact on",
    "exclusive": "alone with",
    "before": "acts before",
    "after": "acts after",
    "closures": "supports closures that run several times",
    "sparse": "supports sparse gradients",
    "warmup_steps": "changes nothing in the first steps",
    "record": "reads the first forward pass",
}
REFERENCES = Section("References", "references", SectionType.SINGULAR)
DOCSTRINGS = GoogleParser([*DEFAULT_SECTIONS, REFERENCES])


def show_plugin(name: str, *, as_json: bool = False) -> None:
    """Print what a plugin does, its options, where it acts, what it must beat and its source.

    Args:
        name: Of a correction, an optimizer or a workload.
        as_json: For programs: a list with one object for each kind that has this name. Otherwise
            text for people.

    Raises:
        ValueError: If nothing of that name is installed.
        PluginLoadError: If it cannot be imported.
    """
    installed = {kind: regrad.available(group) for kind, group in GROUPS.items()}
    found = []
    for kind, entries in installed.items():
        if name in entries:
            found.append(describe(kind, entries[name]))
    if not found:
        names = sorted(set().union(*installed.values()))
        known = ", ".join(map(printable, names))
        raise ValueError(f"no plugin named {name!r}; installed: {known}{did_you_mean(name, names)}")
    console = Terminal(soft_wrap=as_json)
    if as_json:
        console.out(json.dumps(found, indent=2, default=str), highlight=False)
        return
    for details in found:
        _print(console, details)


def describe(kind: str, entry: Entry) -> dict[str, Any]:
    """Return what is known of a plugin.

    Args:
        kind: "correction", "optimizer", "workload" or "layout".
        entry: What its metadata say.

    Returns:
        `kind`, the fields of `entry`, `description` (of its docstring), `options` (name, type,
        default, meaning), `links`, `card` (the first section of its distribution's README). For
        corrections also `needs`, `parts`, and `controls` by optimizer.

    Raises:
        PluginLoadError: If it cannot be imported.
    """
    loaded = regrad.load(entry.name, GROUPS[kind])
    details = {
        "kind": kind,
        **dataclasses.asdict(entry),
        "description": _description(_docstring(loaded)),
    }
    if isinstance(loaded, regrad.Composition):
        details |= _composition(loaded)
        details["controls"] = _controls(entry.name)
    elif kind == "correction":
        details["options"] = _options_of(loaded)
        details["needs"] = _needs(loaded)
        details["controls"] = _controls(entry.name)
    elif kind == "layout":
        details["options"] = []  # attach calls it, with nothing to choose
    else:
        details["options"] = _arguments_of(loaded)
    metadata: Any = _metadata_of(entry)
    details["links"] = _links(metadata.get_all("Project-URL") or [])
    if kind == "workload":
        details["card"] = ""  # its distribution offers many, and the README is about others too
    else:
        details["card"] = _first_section(metadata.get("Description") or "")
    return details


def _links(lines: list[str]) -> dict[str, str]:
    """Return addresses by their labels, from lines "LABEL, ADDRESS"."""
    links = {}
    for line in lines:
        label, _, address = line.partition(", ")
        links[label] = address
    return links


def _metadata_of(entry: Entry) -> Any:
    """Return the metadata of the distribution behind an entry; empty if it has gone since."""
    found = find(entry.distribution, entry.version)
    return found.source.metadata if found else Message()


def _composition(loaded: regrad.Composition) -> dict[str, Any]:
    """Describe corrections under one name: their options have the part's name in front."""
    options = []
    stages: list[str] = []
    for part in loaded.parts:
        kind = regrad.load(part)
        options += [{**option, "name": f"{part}.{option['name']}"} for option in _options_of(kind)]
        stages += kind.needs.stages
    return {
        "description": f"{' and '.join(loaded.parts)} together.",
        "parts": list(loaded.parts),
        "options": options,
        "needs": {"stages": list(dict.fromkeys(stages))},
    }


def _options_of(kind: type[Correction]) -> list[dict[str, Any]]:
    """Return the options of a correction."""
    meanings = _meanings(_docstring(kind))
    options = []
    for field in dataclasses.fields(kind.Options):
        meaning = meanings.get(field.name, "")
        options.append(_option(field.name, field.type, field.default, meaning))
    return options


def _arguments_of(loaded: Any) -> list[dict[str, Any]]:
    """Return what a class or a function takes, if it can be chosen."""
    meanings = _meanings(_docstring(loaded))
    if not inspect.isroutine(loaded) and not isinstance(loaded, type):
        meanings |= _meanings(_docstring(type(loaded).__call__))
    options = []
    for name, parameter in inspect.signature(loaded).parameters.items():
        if name in NOT_OPTIONS:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        options.append(_option(name, parameter.annotation, default, meanings.get(name, "")))
    return options


def _option(name: str, annotation: Any, default: Any, meaning: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": _type_in_words(annotation),
        "default": default,
        "meaning": meaning,
    }


def _needs(kind: type[Correction]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind.needs)]
    declared = {name: getattr(kind.needs, name) for name in names}
    return declared | {"conflicts": dict(declared["conflicts"])}


def _controls(name: str) -> dict[str, dict[str, Any] | None]:
    """Return the change that a correction with its default options must beat, by optimizer."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizers = {
        "sgd:momentum=0.9": torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        "adamw": torch.optim.AdamW([weight]),
    }
    try:
        controls = {
            text: control_of_stack([name], optimizer) for text, optimizer in optimizers.items()
        }
    except Exception as cause:  # a plugin may fail in any way: it is named, and the cause chained
        said = f"{type(cause).__name__}: {printable(cause)}"
        raise PluginLoadError(f"plugin {name!r} cannot say what it must beat: {said}") from cause
    return {text: _changes(control) if control else None for text, control in controls.items()}


def _changes(control: Control) -> dict[str, Any]:
    """Return a control's name and what it changes."""
    neutral = control_as_values(Control(name=""))
    values = control_as_values(control)
    return {key: value for key, value in values.items() if value != neutral.get(key)}


def _type_in_words(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _docstring(documented: Any) -> docstring_parser.Docstring:
    """Return the parts of a docstring; one whose sections cannot be read is all description."""
    text = _without_roles(inspect.getdoc(documented) or "")
    try:
        return DOCSTRINGS.parse(text)
    except docstring_parser.ParseError:
        whole = docstring_parser.Docstring()
        whole.short_description = text
        return whole


def _description(docstring: docstring_parser.Docstring) -> str:
    """Return what a docstring says before its sections, a paragraph a line."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", docstring.description or "")


def _meanings(docstring: docstring_parser.Docstring) -> dict[str, str]:
    """Return what a docstring says about each argument, in one line."""
    meanings = {}
    for parameter in docstring.params:
        if parameter.args[0] == "param":
            meanings[parameter.arg_name] = " ".join((parameter.description or "").split())
    return meanings


def _without_roles(text: str) -> str:
    """Return reStructuredText without the names of its roles."""
    return re.sub(r":\w+:`([^`]*)`", r"\1", text)


def _first_section(readme: str) -> str:
    """Return the first section under a README's title, without its heading."""
    section = re.search(r"^## [^\n]*\n(.*?)(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)
    return section[1].strip() if section else ""


def _print(console: Terminal, details: Mapping[str, Any]) -> None:
    title = f"{details['name']}: {details['kind']}"
    source = f"from {details['distribution']} {details['version']}, {details['value']}"
    console.print(Text(printable(title), style="bold"))
    console.print(Text(printable(source)))
    texts = [details["description"], details["card"]]
    if details["kind"] != "workload":
        texts.insert(0, details["summary"])  # that of a workload is about its distribution
    for text in texts:
        if text:
            console.print("", Text(printable(text, keep=KEPT_CHARACTERS)), sep="\n")
    if details["options"]:
        console.print()
        console.print(_table(details["options"]))
        console.print()
    for name, value in _facts(details).items():
        console.print(Text(printable(f"{name}: {value}")))
    console.print()


def _table(options: list[dict[str, Any]]) -> Table:
    rows = [
        (option["name"], str(option["default"]), option["type"], option["meaning"])
        for option in options
    ]
    table = plain_table(("option", "default", "type", "meaning"), rows)
    table.columns[-1].ratio = 1  # the meaning takes the width that is left
    return table


def _facts(details: Mapping[str, Any]) -> dict[str, str]:
    """Return what is declared, in words; what is empty, false or zero is left out."""
    needs = details.get("needs", {})
    facts = {"parts": ", ".join(details.get("parts", []))}
    for key, words in FACTS.items():
        facts[words] = _value_in_words(needs.get(key))
    for name, reason in needs.get("conflicts", {}).items():
        facts[f"conflicts with {name}"] = reason
    for optimizer, control in details.get("controls", {}).items():
        facts[f"must beat on {optimizer}"] = _control_in_words(control)
    facts |= details["links"]
    return {name: value for name, value in facts.items() if value}


def _control_in_words(control: Mapping[str, Any] | None) -> str:
    """Say what a correction must beat, and what that changes."""
    if control is None:
        return "nothing but the baseline"
    changes = []
    for key, value in control.items():
        if key != "name":
            changes.append(f"{key} {_value_in_words(value)}")
    return f"{control['name']} ({', '.join(changes)})"


def _value_in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value or "")
