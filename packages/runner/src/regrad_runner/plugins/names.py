"""Which names a new plugin may have: those that break nothing, here and elsewhere."""

from __future__ import annotations

import builtins
import io
import keyword
import re
import tokenize
from collections.abc import Iterable
from importlib.util import find_spec

import regrad
from regrad import distributions
from regrad.registry import GROUPS
from regrad.text import printable

from regrad_runner.plugins.sources import NOT_OFFERED, torch_optimizers

NAME_PATTERN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST_PLUGIN_NAME = 50
WORDS = {"none", "baseline", "all", "true", "false", "null", "nan", "inf", "yes", "no", "on", "off"}
LAYOUTS = {"plain", "ddp", "fsdp2"}
DEVICES = {
    *("con", "prn", "aux", "nul"),
    *(f"com{number}" for number in range(10)),
    *(f"lpt{number}" for number in range(10)),
}
OUR_DISTRIBUTIONS = {
    "regrad",
    "core",
    "runner",
    "testing",
    "transformers",
    "lightning",
    "bench",
    "deepspeed",
    "accelerate",
    "activations",
    "adafisher",
    "adanorm",
    "boosted",
    "bop",
    "cautious",
    "centralization",
    "clipping",
    "gcgd",
    "gcode",
    "gcw",
    "powergrad",
    "tom",
    "velo",
    "xgrad",
}
OUR_PLUGINS = {
    "adam3",
    "agc",
    "bop2",
    "cifar10",
    "cifar100",
    "clip-norm",
    "clip-update",
    "clip-value",
    "digits",
    "digits-binary",
    "fashion-mnist",
    "imagefolder",
    "int8-rows",
    "parquet",
    "text",
    "uniform-rows",
    "wta-crs",
}
# Of distributions and plugins, whether they are installed or not.
OURS = OUR_DISTRIBUTIONS | OUR_PLUGINS


def package_of(name: str) -> str:
    """Return the name of a plugin's package.

    Example:
        >>> package_of("my-method"), class_of("my-method")
        ('regrad_my_method', 'MyMethod')
    """
    return f"regrad_{name.replace('-', '_')}"


def class_of(name: str) -> str:
    """Return the name of a plugin's class."""
    return "".join(word.title() for word in name.split("-"))


def check_name(name: str, sources: Iterable[str]) -> None:
    """Raise a `ValueError` unless a new plugin may have this name.

    Args:
        name: Of the correction.
        sources: The Python files that its class's name will stand in.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            "name must be lower-case words with hyphens between them, such as 'my-method', "
            f"got {name!r}"
        )
    if len(name) > LONGEST_PLUGIN_NAME:
        raise ValueError(f"name must have at most {LONGEST_PLUGIN_NAME} characters, got {name!r}")
    taken = _owner(name)
    if taken:
        raise ValueError(f"name must be a new one, got {name!r}, which {taken}")
    misread = _misread_by(name, sources)
    if misread:
        raise ValueError(f"name must not have another meaning, got {name!r}, {misread}")


def _owner(name: str) -> str:
    """Say who already has this name; empty if it is free."""
    for kind, group in GROUPS.items():
        entry = regrad.available(group).get(name)
        if entry is not None:
            article = "an" if kind == "optimizer" else "a"
            return f"{printable(entry.distribution)} offers as {article} {kind}"
    distribution = f"regrad-{name}"
    for one in distributions.every():
        folder_name = re.split(r"-\d|\.dist-info$|\.egg-info$", one.name)[0]
        if re.sub(r"[-_.]+", "-", folder_name).lower() == distribution:
            return f"the installed distribution {distribution} has"
    if name in OURS:
        return "is a part of regrad"
    if name in {*torch_optimizers(), *regrad.available("regrad.optimizers"), *NOT_OFFERED}:
        return "is an optimizer of torch"
    if find_spec(package_of(name)) is not None:
        return f"the installed package {package_of(name)} has"
    return ""


def _misread_by(name: str, sources: Iterable[str]) -> str:
    """Say what would read the name as something else; empty if it is a plain name."""
    class_name = class_of(name)
    if name in WORDS | LAYOUTS:
        return "which settings read as a special value"
    if name in DEVICES:
        return "which is a device on Windows"
    if name.startswith("regrad-"):
        return "whose distribution would be called regrad twice"
    if class_name in identifiers(sources):
        return f"whose class {class_name} is already used in its own files"
    return _misread_by_python(name.replace("-", "_"), class_name)


def _misread_by_python(spoken: str, class_name: str) -> str:
    """Say what Python or pytest would take a name or its class for; nothing if neither does.

    Args:
        spoken: The name with underscores.
        class_name: That of its class.
    """
    if spoken in {word.lower() for word in (*keyword.kwlist, *keyword.softkwlist)}:
        return "which is a keyword of Python"
    for word in (spoken, class_name):
        if word in dir(builtins):
            return f"which is {word} in Python"
    if class_name.startswith("Test"):
        return f"whose class {class_name} pytest would take for tests"
    return ""


def identifiers(sources: Iterable[str]) -> set[str]:
    """Return the names that stand in the code of Python files."""
    found: set[str] = set()
    for text in sources:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found |= {token.string for token in tokens if token.type == tokenize.NAME}
    return found
