"""Find, load and create corrections from the entry points of installed distributions."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from regrad import distributions
from regrad.correction import API_VERSION, Correction, did_you_mean
from regrad.errors import PluginLoadError, RegradError
from regrad.specs import read_spec
from regrad.text import printable

ALLOWED = "REGRAD_PLUGINS"
DISABLED = "REGRAD_DISABLE"
GROUPS = {
    "correction": "regrad",
    "optimizer": "regrad.optimizers",
    "workload": "regrad.workloads",
    "layout": "regrad.layouts",
}
# Lists and texts in quotes.
COVERED = r"\[[^\]]*\]|\([^)]*\)|'[^']*'" + r'|"[^"]*"'
USES = {
    "correction": "give it to regrad.attach, or to --corrections",
    "optimizer": "train with it in place of yours: regrad.load({name!r}, 'regrad.optimizers'), "
    "or --optimizer {name}",
    "workload": "give it to --workload",
    "layout": "attach takes it by itself where model and optimizer are of its engine",
}


@dataclass(frozen=True)
class Entry:
    """What metadata says about one plugin, without importing it.

    The fields are as somebody wrote them: show them through `regrad.text.printable`.

    Attributes:
        name: The name that loads it.
        distribution: Distribution that offers it; all of them, if several claim the name.
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
    """Several corrections under one name.

    Args:
        parts: Names of the corrections, in order. `create` takes their options prefixed with the
            part's name: "gcgd:gcw.prior=0.9".
    """

    parts: tuple[str, ...]
    api_version: int = API_VERSION


def available(group: str = "regrad") -> dict[str, Entry]:
    """Return what is installed, by name, from metadata alone.

    Args:
        group: "regrad" (corrections), "regrad.optimizers", "regrad.workloads" or
            "regrad.layouts".

    Returns:
        One `Entry` per name, sorted. A name that two distributions claim, or that the environment
        excludes, is listed with `refused` set, and `load` refuses it. `REGRAD_DISABLE` lists names
        to leave out of every group, `REGRAD_PLUGINS` the only corrections to offer; commas or
        spaces separate names, an empty list is none. A distribution whose metadata cannot be read
        offers nothing; `regrad plugins doctor` names it.
    """
    claims: dict[str, list[Entry]] = {}
    for found, point in distributions.offers(group):
        entry = Entry(point.name, found.name, found.version, point.value, found.summary)
        claims.setdefault(point.name, []).append(entry)
    return {name: _single_entry(claims[name], group) for name in sorted(claims)}


def _single_entry(entries: list[Entry], group: str) -> Entry:
    """Return the entry to offer under a name, with the reason if it must not be loaded."""
    entry = entries[0]
    claimants = sorted({_source(entry) for entry in entries})
    if len(claimants) > 1:
        together = " and ".join(claimants)
        reason = f"{entry.name!r} is offered by {together}; uninstall all but one"
        return Entry(entry.name, together, "", "", "", refused=reason)
    return replace(entry, refused=_excluded_by_environment(entry.name, group))


def _source(entry: Entry) -> str:
    """Return distribution and version, fit to be shown."""
    return printable(f"{entry.distribution} {entry.version}".strip())


def _excluded_by_environment(name: str, group: str) -> str | None:
    """Return why the environment leaves a name out, or None."""
    if is_disabled(name):
        return f"{DISABLED} in the environment leaves out {name!r}; take it off that list"
    allowed = _names_in(ALLOWED)
    if group == "regrad" and allowed and name not in allowed:
        return f"{ALLOWED} in the environment leaves out {name!r}; put it on that list"
    return None


def is_disabled(name: str) -> bool:
    """Say whether the environment leaves a name out of every group."""
    return name in _names_in(DISABLED)


def _names_in(variable: str) -> list[str]:
    """Return the names that a variable of the environment lists."""
    return re.findall(r"[^\s,]+", os.environ.get(variable, ""))


def load(name: str, group: str = "regrad") -> Any:
    """Import one plugin and return what its entry point names.

    Args:
        name: Name of the correction (or optimizer, or workload).
        group: Entry-point group, as for `available`.

    Returns:
        The class, function or `Composition`.

    Raises:
        ValueError: If nothing of that name is installed; the message says where else the name is
            known.
        PluginLoadError: If it cannot be imported, does not fit this core, or two
            distributions claim the name. Other plugins are unaffected.
    """
    entries = available(group)
    if name not in entries:
        raise ValueError(_unknown(name, group, entries))
    entry = entries[name]
    if entry.refused:
        raise PluginLoadError(entry.refused)
    loaded = _import(entry, group)
    misfit = _misfit(loaded, name) if group == "regrad" else ""
    if misfit:
        raise PluginLoadError(f"{_in_words(entry)} {misfit}")
    return loaded


def _import(entry: Entry, group: str) -> Any:
    """Import what an entry point names.

    Raises:
        PluginLoadError: If it names nothing, or cannot be imported.
    """
    if not re.fullmatch(r"[\w.]+(:[\w.]+)?(\s*\[.*\])?", entry.value):
        rule = f"must have an entry point 'module:attribute', got {entry.value!r}"
        raise PluginLoadError(f"{_in_words(entry)} {rule}; reinstall it")
    try:
        return metadata.EntryPoint(entry.name, entry.value, group).load()
    # A plugin may fail in any way: name it, and chain the cause.
    except (Exception, SystemExit) as cause:
        said = printable(cause, keep="\n")
        raise PluginLoadError(f"{_in_words(entry)} could not be imported: {said}") from cause


def _in_words(entry: Entry) -> str:
    """Return the name of a plugin, where it comes from, and the versions of regrad it needs."""
    return f"plugin {entry.name!r} ({', for '.join((_source(entry), *_needed_cores(entry)))})"


def _needed_cores(entry: Entry) -> list[str]:
    """Return the requirements on regrad itself of the distribution behind an entry."""
    found = distributions.find(entry.distribution, entry.version)
    requires = found.requires if found else []
    return [printable(line) for line in requires if re.match(r"regrad(?![\w.-])", line)]


def _unknown(name: str, group: str, entries: Mapping[str, Entry]) -> str:
    """Say that nothing has this name, and what the user may have meant."""
    kind = _kind_of(group)
    several = several_in(name) if group == "regrad" else []
    if several:
        return f"a name must stand for one correction, got {name!r}; write {several}"
    installed = ", ".join(printable(known) for known in entries) or "none"
    text = f"no {kind} named {name!r}; installed: {installed}"
    elsewhere = _known_elsewhere(name, group)
    if elsewhere:
        return f"{text}; {elsewhere}"
    return text + did_you_mean(name, entries)


def _known_elsewhere(name: str, group: str) -> str:
    """Say what has a name that is not in a group; empty if nothing has it."""
    for kind, place in GROUPS.items():
        if place != group and name in available(place):
            article = "an" if kind == "optimizer" else "a"
            return f"{name!r} is {article} {kind}: {USES[kind].format(name=name)}"
    if group == "regrad" and name.lower() in _optimizers_of_torch():
        return f"{name!r} is an optimizer of torch: train with it in place of yours"
    for one in distributions.broken():
        if re.search(rf"^\s*{re.escape(name)}\s*=", one.points, flags=re.MULTILINE):
            folder = printable(one.folder)
            return f"{folder} has it, but {printable(one.problem)}; reinstall it"
    return ""


def _optimizers_of_torch() -> set[str]:
    """Return the names of torch's optimizers in lower case; none before torch is imported."""
    torch = sys.modules.get("torch.optim")
    names = getattr(torch, "__all__", ())
    return {name.lower() for name in names if isinstance(getattr(torch, name), type)}


def _kind_of(group: str) -> str:
    """Return what the plugins of a group are called."""
    for kind, place in GROUPS.items():
        if place == group:
            return kind
    return "plugin"


def several_in(text: str) -> list[str]:
    """Return the corrections in a text that names several, such as "xgrad, agc:axis=auto".

    Commas, spaces and plus signs separate, where the name of an installed correction follows.

    Returns:
        A text per correction; empty if the text does not name several.

    Example:
        >>> several_in("no-such-correction, neither")
        []
    """
    # The longest first: one name may be the beginning of another.
    known = sorted(available(), key=len, reverse=True)
    if not known:
        return []
    name = rf"(?:{'|'.join(map(re.escape, known))})(?=\s*(?:[:+,;&|\s]|$))"
    # Lists and quotes may hold names and commas too: they are covered, in their length.
    covered = re.sub(COVERED, lambda found: "_" * len(found[0]), text)
    if not re.match(rf"\s*{name}", covered):
        return []
    cuts = [found.end() for found in re.finditer(rf"[+,;&|\s]\s*(?={name})", covered)]
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    stripped = [piece.strip().rstrip("+,;&|").strip() for piece in pieces]
    parts = [part for part in stripped if part]
    return parts if len(parts) > 1 else []


def _misfit(loaded: Any, name: str) -> str:
    """Say why `loaded` is not a correction that fits this core; empty if it is."""
    is_class = isinstance(loaded, type) and issubclass(loaded, Correction)
    if not is_class and not isinstance(loaded, Composition):
        return f"must offer a Correction class or a Composition, got {printable(repr(loaded))}"
    if loaded.api_version != API_VERSION:
        is_newer = loaded.api_version > API_VERSION
        mend = "regrad" if is_newer else "version of the plugin"
        return f"has api {loaded.api_version}, this core {API_VERSION}; install a newer {mend}"
    if is_class and getattr(loaded, "name", None) != name:
        return f"must offer a class whose name is {name!r}"
    return ""


def create(spec: str, **options: Any) -> Correction | tuple[Correction, ...]:
    """Create a correction from its name and options.

    Args:
        spec: Name, optionally with options: "agc:max_ratio=0.02,axis=auto".
        **options: More options; they take precedence over those in `spec`.

    Returns:
        The correction, or one per part for a `Composition`.

    Raises:
        ValueError: If the name is not installed, `spec` cannot be read or an
            option is out of range.
        TypeError: If `spec` is not a string, or an option is unknown or of the wrong type.
        PluginLoadError: If the plugin cannot be loaded.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a name such as 'agc:max_ratio=0.02', got {spec!r}")
    name, written = _read_one(spec)
    loaded = load(name)
    merged = {**written, **options}
    if isinstance(loaded, Composition):
        return _create_parts(name, loaded, merged)
    return loaded(**merged)  # type: ignore[no-any-return]


def _read_one(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options in a text; say how to take it apart if it names several."""
    several = several_in(spec) if "+" in spec else []
    if several:
        raise ValueError(_alone(spec, several))
    try:
        return read_spec(spec)
    except ValueError as error:
        several = several_in(spec)
        if several:
            raise ValueError(_alone(spec, several)) from error
        raise


def _alone(spec: str, several: list[str]) -> str:
    """Say that a text names several corrections."""
    return f"a name must stand for one correction, got {spec!r}; write {several}"


def _create_parts(
    name: str, composition: Composition, options: Mapping[str, Any]
) -> tuple[Correction, ...]:
    """Create the corrections of a composition, each with the options that start with its name."""
    of_part: dict[str, dict[str, Any]] = {part: {} for part in composition.parts}
    for key, value in options.items():
        part, _, option = key.partition(".")
        if not option or part not in of_part:
            allowed = ", ".join(of_part)
            raise TypeError(
                f"options of {name!r} must start with one of {allowed} and a dot, got {key!r}"
            )
        of_part[part][option] = value
    made: list[Correction] = []
    for part, own in of_part.items():
        made.extend(_created(part, **own))
    return tuple(made)


def _created(spec: str, **options: Any) -> tuple[Correction, ...]:
    """Return what `create` returns, always as a tuple."""
    made = create(spec, **options)
    return made if isinstance(made, tuple) else (made,)


def create_all(specs: Iterable[str | Correction]) -> list[Correction]:
    """Turn what `attach` is given into corrections.

    Args:
        specs: Names with options as for `create`, or `Correction` objects, in the order in which
            they act.

    Returns:
        The corrections, with matching stages and hooks, and no name twice.

    Raises:
        TypeError: If `specs` is not a list, or an item is neither; the message shows the right
            form.
        ValueError: If no correction of that name is installed or an option is out of range.
        PluginLoadError: If a plugin cannot be loaded.
        RegradError: If a name occurs twice, or a class declares what it does not implement.
    """
    given = as_list(specs)
    made: list[Correction] = []
    for item in given:
        if isinstance(item, str):
            made.extend(_created(item))
        else:
            made.append(item)
    names: set[str] = set()
    for correction in made:
        correction.check_class()
        if correction.name in names:
            raise RegradError(
                f"corrections must be different, got {correction.name!r} twice in {given}"
            )
        names.add(correction.name)
    return made


def as_list(specs: Iterable[str | Correction]) -> list[str | Correction]:
    """Return what `create_all` would create from as a list, to be created later or again.

    Args:
        specs: As for `create_all`.

    Raises:
        TypeError: If `specs` is not a list, or an item is neither a name nor a `Correction`; the
            message shows the right form.
    """
    _refuse_no_list(specs)
    items: list[Any] = list(specs)
    for item in items:
        if not isinstance(item, str | Correction):
            rule = "corrections must be names or Correction objects"
            raise TypeError(f"{rule}, got {_form_of(item)}")
    return items


def _refuse_no_list(specs: Any) -> None:
    """Raise `TypeError` with the right form unless `specs` is a list or can be read as one."""
    rule = "corrections must be a list"
    if isinstance(specs, str):
        raise TypeError(f"{rule}, got {specs!r}; write {several_in(specs) or [specs]}")
    if specs is None:
        raise TypeError(f"{rule}, got None; write [] for no correction")
    if isinstance(specs, Correction):
        raise TypeError(f"{rule}, got {specs!r}; write [{specs!r}]")
    if isinstance(specs, Mapping):
        calls = ", ".join(_call(name, options) for name, options in specs.items())
        raise TypeError(f"{rule}, got a dict; write [{calls}]")
    if isinstance(specs, set | frozenset):
        ordered = ", ".join(sorted(map(repr, specs)))
        raise TypeError(f"{rule}, got a set, which has no order; write [{ordered}]")
    if isinstance(specs, type) or not isinstance(specs, Iterable) or isinstance(specs, bytes):
        raise TypeError(f"{rule}, got {_form_of(specs)}")


def _form_of(item: Any) -> str:
    """Say what an item is that is not a correction, and the right form of it."""
    if isinstance(item, type) and issubclass(item, Correction):
        return f"the class {item.__name__}; write [{item.__name__}()]"
    kind = item if isinstance(item, type) else type(item)
    if any(base.__module__ == "torch.optim.optimizer" for base in kind.__mro__):
        return (
            f"the optimizer {kind.__name__}; it is the argument before: attach(model, optimizer, …)"
        )
    if isinstance(item, Composition):
        return f"{item!r}; write the name it is installed under"
    if isinstance(item, Mapping):
        calls = ", ".join(_call(name, options) for name, options in item.items())
        return f"{item!r}; write [{calls}]"
    if isinstance(item, tuple | list):
        return f"{item!r}; {_unpacked(item)}"
    return repr(item)


def _unpacked(items: tuple[Any, ...] | list[Any]) -> str:
    """Return the right form of a list inside the list."""
    if len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], Mapping):
        return f"write [{_call(*items)}]"
    return f"write [{', '.join(map(repr, items))}]: one list, not a list of lists"


def _call(name: Any, options: Any) -> str:
    """Return the call that creates a correction with options."""
    if not isinstance(options, Mapping):
        return f"regrad.create({name!r})"
    if all(isinstance(key, str) and key.isidentifier() for key in options):
        words = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"regrad.create({name!r}{words})"
    return f"regrad.create({name!r}, **{options!r})"


def origin(correction: Correction) -> dict[str, str]:
    """Return the distribution and version that a correction comes from.

    Returns:
        "distribution" and "version"; "local" and "" for one that does not come from a distribution.
    """
    entry = available().get(correction.name)
    package = type(correction).__module__.partition(".")[0]
    if entry and entry.value.startswith((f"{package}.", f"{package}:")):
        return {"distribution": entry.distribution, "version": entry.version}
    return {"distribution": "local", "version": ""}
