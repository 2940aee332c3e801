"""Everything that one installed plugin says of itself: its metadata, its docstrings, its declarations."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from email.message import Message
from typing import Any

import regrad
import torch
from regrad.correction import Control, Correction, did_you_mean
from regrad.distributions import find
from regrad.errors import PluginLoadError
from regrad.registry import GROUPS, Entry
from regrad.text import printable
from rich.table import Table
from rich.text import Text

from regrad_runner.settings.arms import created, merged
from regrad_runner.terminal import LAYOUT_CHARACTERS, Terminal, plain_table

NOT_OPTIONS = {"self", "params"}
FACTS = {  # a correction's declarations, in words
    "stages": "acts on",
    "layouts": "exact on",
    "exclusive": "alone with",
    "before": "acts before",
    "after": "acts after",
    "closures": "bears closures that run several times",
    "sparse": "bears sparse gradients",
    "warmup_steps": "changes nothing in the first steps",
    "record": "reads the first forward pass",
}


def show_plugin(name: str, *, as_json: bool = False) -> None:
    """Print what a plugin does, its options, where it acts, what it must beat and where it comes from.

    Args:
        name: Of a correction, an optimizer or a workload.
        as_json: For programs: a list with one object for each kind that has this name; else text for people.

    Raises:
        ValueError: If nothing of that name is installed.
        PluginLoadError: If it cannot be imported.
    """
    installed = {kind: regrad.available(group) for kind, group in GROUPS.items()}
    found = [
        describe(kind, entries[name]) for kind, entries in installed.items() if name in entries
    ]
    if not found:
        names = sorted({name for entries in installed.values() for name in entries})
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
        kind: "correction", "optimizer" or "workload".
        entry: What its metadata say.

    Returns:
        `kind`, the fields of `entry`, `description` (of its docstring), `options` (name, type, default, meaning),
        `links`, `card` (the first section of its distribution's README); for corrections also `needs`, `parts` and
        `controls`, by optimizer.

    Raises:
        PluginLoadError: If it cannot be imported.
    """
    loaded = regrad.load(entry.name, GROUPS[kind])
    details = {
        "kind": kind,
        **dataclasses.asdict(entry),
        "description": _opening(inspect.getdoc(loaded) or ""),
    }
    if isinstance(loaded, regrad.Composition):
        details |= _composition(loaded) | {"controls": _controls(entry.name)}
    elif kind == "correction":
        details |= {
            "options": _options_of(loaded),
            "needs": _needs(loaded),
            "controls": _controls(entry.name),
        }
    else:
        details["options"] = _arguments_of(loaded)
    about: Any = _metadata_of(entry)
    urls = (line.partition(", ") for line in about.get_all("Project-URL") or [])
    details["links"] = {label: address for label, _, address in urls}
    details["card"] = "" if kind == "workload" else _first_section(about.get("Description") or "")
    return details


def _metadata_of(entry: Entry) -> Any:
    """Return the metadata of the distribution behind an entry; empty ones where it is gone meanwhile."""
    found = find(entry.distribution, entry.version)
    return found.source.metadata if found else Message()


def _composition(loaded: regrad.Composition) -> dict[str, Any]:
    """Describe corrections that go by one name: their options have the part's name in front."""
    parts = {part: regrad.load(part) for part in loaded.parts}
    options = [
        {**option, "name": f"{part}.{option['name']}"}
        for part, kind in parts.items()
        for option in _options_of(kind)
    ]
    return {
        "description": f"{' and '.join(parts)} together.",
        "parts": list(parts),
        "options": options,
        "needs": {
            "stages": list(
                dict.fromkeys(stage for kind in parts.values() for stage in kind.needs.stages)
            )
        },
    }


def _options_of(kind: type[Correction]) -> list[dict[str, Any]]:
    meanings = _meanings(inspect.getdoc(kind) or "")
    return [
        {
            "name": f.name,
            "type": _type(f.type),
            "default": f.default,
            "meaning": meanings.get(f.name, ""),
        }
        for f in dataclasses.fields(kind.Options)
    ]


def _arguments_of(loaded: Any) -> list[dict[str, Any]]:
    """Return what a class or a function takes, where it can be chosen."""
    meanings = _meanings(inspect.getdoc(loaded) or "")
    if not inspect.isroutine(loaded) and not isinstance(loaded, type):
        meanings |= _meanings(inspect.getdoc(type(loaded).__call__) or "")
    return [
        {
            "name": name,
            "type": _type(parameter.annotation),
            "default": None if parameter.default is parameter.empty else parameter.default,
            "meaning": meanings.get(name, ""),
        }
        for name, parameter in inspect.signature(loaded).parameters.items()
        if name not in NOT_OPTIONS
    ]


def _needs(kind: type[Correction]) -> dict[str, Any]:
    declared = {f.name: getattr(kind.needs, f.name) for f in dataclasses.fields(kind.needs)}
    return declared | {"conflicts": dict(declared["conflicts"])}


def _controls(name: str) -> dict[str, dict[str, Any] | None]:
    """Return the change that a correction with its default options must beat, by optimizer."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizers = {
        "sgd:momentum=0.9": torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        "adamw": torch.optim.AdamW([weight]),
    }
    try:
        made = created(name)
        controls = {
            text: merged([c.control(optimizer) for c in made])
            for text, optimizer in optimizers.items()
        }
    except Exception as cause:  # a plugin may fail in any way: it is named, and the cause chained
        said = f"{type(cause).__name__}: {printable(cause)}"
        raise PluginLoadError(f"plugin {name!r} cannot say what it must beat: {said}") from cause
    return {text: _changes(control) if control else None for text, control in controls.items()}


def _changes(control: Control) -> dict[str, Any]:
    """Return a control's name and what it changes."""
    neutral = Control(name=control.name)
    fields = {f.name: getattr(control, f.name) for f in dataclasses.fields(control)}
    return {
        key: value
        for key, value in fields.items()
        if key == "name" or value != getattr(neutral, key)
    }


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _opening(text: str) -> str:
    """Return what a docstring says before its sections, a paragraph a line."""
    before = re.split(
        r"^(?:Args|Attributes|Returns|Raises|Example|References):",
        text,
        maxsplit=1,
        flags=re.MULTILINE,
    )
    return re.sub(r"(?<=\S)\n(?=\S)", " ", _plain(before[0]).strip())


def _meanings(text: str) -> dict[str, str]:
    """Return what the section Args of a docstring says of each argument."""
    section = re.search(r"^Args:\n((?:[ ].*\n?|\n)*)", text, flags=re.MULTILINE)
    items = re.findall(
        r"^ {4}(\w+): ((?:.*)(?:\n {5,}.*)*)", section[1] if section else "", flags=re.MULTILINE
    )
    return {name: " ".join(_plain(meaning).split()) for name, meaning in items}


def _plain(text: str) -> str:
    """Return reStructuredText without the names of its roles."""
    return re.sub(r":\w+:`([^`]*)`", r"\1", text)


def _first_section(readme: str) -> str:
    """Return the first section under a README's title, without its heading."""
    section = re.search(r"^## [^\n]*\n(.*?)(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)
    return section[1].strip() if section else ""


def _print(console: Terminal, details: Mapping[str, Any]) -> None:
    source = f"{details['distribution']} {details['version']}, {details['value']}"
    console.print(
        Text(printable(f"{details['name']}: {details['kind']}"), style="bold"),
        Text(printable(f"from {source}")),
        sep="\n",
    )
    about_itself = (
        details["kind"] != "workload"
    )  # one distribution offers many, and speaks of other things
    for text in (details["summary"] * about_itself, details["description"], details["card"]):
        if text:
            console.print("", Text(printable(text, keep=LAYOUT_CHARACTERS)), sep="\n")
    if details["options"]:
        console.print("", _table(details["options"]), "", sep="\n")
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
    facts |= {words: _in_words(needs.get(key)) for key, words in FACTS.items()}
    facts |= {f"conflicts with {name}": why for name, why in needs.get("conflicts", {}).items()}
    for optimizer, control in details.get("controls", {}).items():
        change = {key: _in_words(value) for key, value in (control or {}).items() if key != "name"}
        said = ", ".join(f"{key} {value}" for key, value in change.items())
        facts[f"must beat on {optimizer}"] = (
            f"{control['name']} ({said})" if control else "nothing but the baseline"
        )
    return {name: value for name, value in (facts | details["links"]).items() if value}


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
