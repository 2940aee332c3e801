"""Find, load and create corrections from the entry points of installed distributions."""

import contextlib
import os
import re
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from regrad.correction import API_VERSION, Correction, did_you_mean
from regrad.errors import PluginLoadError, refuse_if

ALLOWED, DISABLED = "REGRAD_PLUGINS", "REGRAD_DISABLE"


@dataclass(frozen=True)
class Entry:
    """What metadata says of one plugin, without importing it.

    Attributes:
        name: The name that loads it.
        distribution: Distribution that offers it; all of them, where several claim the name.
        version: Version of that distribution.
        value: Where the object is, as "module:attribute".
        summary: The distribution's one-line description.
        refused: Why it cannot be loaded, or None.
    """

    name: str
    distribution: str
    version: str
    value: str
    summary: str
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Corrections that go by one name.

    Args:
        parts: Names of the corrections, in order. `create` takes their options
            with the part's name in front: "gcgd:gcw.prior=0.9".
    """

    parts: tuple[str, ...]
    api_version: int = API_VERSION


def available(group: str = "regrad") -> dict[str, Entry]:
    """Return what is installed, by name, from metadata alone.

    Args:
        group: "regrad" (corrections), "regrad.optimizers" or "regrad.workloads".

    Returns:
        One `Entry` per name, sorted. A name that two distributions claim, or that the
        environment leaves out, is listed with `refused` set, and `load` refuses it.
        `REGRAD_DISABLE` lists names to leave out of every group, `REGRAD_PLUGINS` the
        only corrections to offer; commas or spaces separate names, an empty list is none.
    """
    offers: dict[str, dict[str, Entry]] = {}
    for point in metadata.entry_points(group=group):
        about: Any = (
            point.dist.metadata if point.dist else {}
        )  # what a half-removed distribution left may lack all
        name, version, summary = (
            about.get(field) or "" for field in ("Name", "Version", "Summary")
        )
        if name:
            entry = Entry(point.name, name, version, point.value, summary)
            offers.setdefault(point.name, {}).setdefault(
                re.sub(r"[-_.]+", "-", name).lower(), entry
            )
    return {name: _only([*offers[name].values()], group) for name in sorted(offers)}


def _only(entries: list[Entry], group: str) -> Entry:
    """Return the one entry; `refused` says who else claims its name, or which variable leaves it out."""
    name, both = (
        entries[0].name,
        " and ".join(sorted(f"{e.distribution} {e.version}" for e in entries)),
    )
    one = entries[0] if len(entries) == 1 else Entry(name, both, "", "", "")
    lists = (ALLOWED * (group == "regrad"), DISABLED)
    allows, disables = (re.findall(r"[^\s,]+", os.environ.get(variable, "")) for variable in lists)
    reasons = {
        f"{name!r} is offered by {both}; uninstall all but one": len(entries) > 1,
        f"{DISABLED} in the environment leaves out {name!r}; take it off that list": name
        in disables,
        f"{ALLOWED} in the environment leaves out {name!r}; put it on that list": allows
        and name not in allows,
    }
    return replace(one, refused=next((reason for reason, holds in reasons.items() if holds), None))


def load(name: str, group: str = "regrad") -> Any:
    """Import one plugin and return what its entry point names.

    Args:
        name: Name of the correction (or optimizer, or workload).
        group: Entry-point group, as for `available`.

    Returns:
        The class, function or `Composition`.

    Raises:
        ValueError: If nothing of that name is installed.
        PluginLoadError: If it cannot be imported, does not fit this core, or two
            distributions claim the name. Other plugins are unaffected.
    """
    entries = available(group)
    if name not in entries:
        kind = "correction" if group == "regrad" else group.partition(".")[2].rstrip("s")
        known = ", ".join(entries) or "none"
        raise ValueError(
            f"no {kind} named {name!r}; installed: {known}{did_you_mean(name, entries)}"
        )
    entry = entries[name]
    refuse_if(entry.refused, str(entry.refused), PluginLoadError)
    needs = (
        r for r in metadata.requires(entry.distribution) or () if re.match(r"regrad(?![\w.-])", r)
    )
    plugin = f"plugin {name!r} ({', for '.join((f'{entry.distribution} {entry.version}', *needs))})"
    try:
        loaded = metadata.EntryPoint(name, entry.value, group).load()
    except (
        Exception,
        SystemExit,
    ) as cause:  # a plugin may fail in any way: it is named, and the cause chained
        raise PluginLoadError(f"{plugin} could not be imported: {cause}") from cause
    misfit = _misfit(loaded, name) if group == "regrad" else ""
    refuse_if(misfit, f"{plugin} {misfit}", PluginLoadError)
    return loaded


def _misfit(loaded: Any, name: str) -> str:
    """Say why `loaded` is no correction that fits this core; nothing where it is."""
    single = isinstance(loaded, type) and issubclass(loaded, Correction)
    if not single and not isinstance(loaded, Composition):
        return f"must offer a Correction class or a Composition, got {loaded!r}"
    if loaded.api_version != API_VERSION:
        mend = "regrad" if loaded.api_version > API_VERSION else "version of the plugin"
        return f"has api {loaded.api_version}, this core {API_VERSION}; install a newer {mend}"
    return (
        f"must offer a class whose name is {name!r}"
        if single and getattr(loaded, "name", None) != name
        else ""
    )


def create(spec: str, **options: Any) -> Correction | tuple[Correction, ...]:
    """Create a correction from its name and options.

    Args:
        spec: Name, optionally with options: "agc:max_ratio=0.02,axis=auto".
        **options: More options; they win over those in `spec`.

    Returns:
        The correction, or one per part for a `Composition`.

    Raises:
        ValueError: If the name is not installed, `spec` cannot be read or an
            option is out of range.
        TypeError: If an option is unknown or of the wrong type.
        PluginLoadError: If the plugin cannot be loaded.
    """
    name, _, text = spec.partition(":")
    loaded, merged = load(name.strip()), {**_parse_options(text, spec), **options}
    if not isinstance(loaded, Composition):
        return loaded(**merged)  # type: ignore[no-any-return]
    routed: dict[str, dict[str, Any]] = {part: {} for part in loaded.parts}
    for key, value in merged.items():
        part, dot, option = key.partition(".")
        if not dot or part not in routed:
            raise TypeError(
                f"options of {name!r} must start with one of {', '.join(routed)} and a dot, got {key!r}"
            )
        routed[part][option] = value
    return tuple(c for part, values in routed.items() for c in created(part, **values))


def created(spec: str, **options: Any) -> tuple[Correction, ...]:
    """Return what `create` returns, always as a tuple."""
    return made if isinstance(made := create(spec, **options), tuple) else (made,)


def _parse_options(text: str, spec: str) -> dict[str, Any]:
    """Read "a=1,b=[x,y]" into values; commas inside brackets do not separate."""
    options: dict[str, Any] = {}
    for item in re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^,])+", text):
        key, equals, value = item.partition("=")
        closing = {"[": "]", "(": ")"}.get(value.strip()[:1], "")
        if not (equals and key.strip() and value.strip().endswith(closing)):
            raise ValueError(
                f"options must look like 'name:option=value,option=[value,value]', got {spec!r}"
            )
        refuse_if(
            key.strip() in options,
            f"option {key.strip()!r} must be given once, got {spec!r}",
            ValueError,
        )
        options[key.strip()] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> Any:
    """Read a number, true, false, none, a bracketed list, or else the text itself."""
    if text[:1] in ("[", "("):
        return tuple(_parse_value(item.strip()) for item in text[1:-1].split(",") if item.strip())
    for kind in (int, float, {"true": True, "false": False, "none": None}.__getitem__):
        with contextlib.suppress(ValueError, KeyError):
            return kind(text.lower())
    return text


def origin(correction: Correction) -> dict[str, str]:
    """Return distribution and version that a correction comes from; "local" where it is not installed."""
    entry, package = available().get(correction.name), type(correction).__module__.partition(".")[0]
    known = (
        entry
        if entry and entry.value.startswith((f"{package}.", f"{package}:"))
        else Entry("", "local", "", "", "")
    )
    return {"distribution": known.distribution, "version": known.version}
