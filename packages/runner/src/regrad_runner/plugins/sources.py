"""What the source files of installed packages say, without importing them."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec, resolve_name
from pathlib import Path

NOT_OFFERED = {"lbfgs", "sparseadam", "muon"}
MOST_IMPORTS = 3  # from file to file, until one defines what it offers
QUOTES = '"""'
IMPORT = re.compile(r"^from ([\w.]+) import (\([^)]*\)|[^\n]*)", flags=re.MULTILINE)


def torch_optimizers() -> list[str]:
    """Return the names of torch's optimizers that the runner trains with, sorted."""
    classes = names_in_source("torch", "optim/*.py", r"^class (\w+)\((?:Optimizer|Adam)\):")
    return sorted({name.lower() for name in classes} - NOT_OFFERED)


def names_in_source(package: str, files: str, pattern: str) -> set[str]:
    """Return the names that a pattern finds in a package's files.

    The package is not imported: that would take seconds.

    Args:
        package: Its name; one that is not installed has no names.
        files: Pattern of their paths in the package's folder.
        pattern: With one group, the name.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return set()
    names: set[str] = set()
    for path in Path(spec.origin).parent.glob(files):
        names.update(re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return names


def line_of(value: str) -> str:
    """Return the first line of the docstring of what a plugin offers, without its full stop.

    It is read from the package's files: in the module, or in one that the module imports it
    from. The docstring of an object that is not a class or function stands below it.

    Args:
        value: Where it is, as an entry point says: "module:name".

    Returns:
        The line; empty if there is none, or no file that can be read.
    """
    module, _, name = value.partition(":")
    for _ in range(MOST_IMPORTS):
        path = _file_of(module)
        if path is None or not name.isidentifier():
            return ""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""
        pattern = rf"^((class|def) {name}\b|{name} = )"
        definition = re.search(pattern, text, flags=re.MULTILINE)
        if definition is not None:
            return _first_line(text[definition.start() :])
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        module = _imported_from(text, name, package)
    return ""


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it."""
    try:
        spec = find_spec(package)
    except ValueError:  # it was put among the imported ones by hand
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _file_of(module: str) -> Path | None:
    """Return the file of a module, or None if there is none."""
    package, *rest = module.split(".")
    if not all(part.isidentifier() for part in (package, *rest)):
        return None
    folder = folder_of(package)
    if folder is None:
        return None
    place = folder.joinpath(*rest)
    candidates = [place / "__init__.py", place.with_suffix(".py")]
    return next((path for path in candidates if path.is_file()), None)


def _first_line(text: str) -> str:
    """Return the first line of the docstring of the definition that a text begins with."""
    header, _, rest = text.partition(QUOTES)
    docstring = rest.partition(QUOTES)[0]
    try:
        definition = ast.parse(f"{header}{QUOTES}{docstring}{QUOTES}\n")
    except (SyntaxError, ValueError):
        return ""
    line = _docstring_of(definition).partition("\n")[0].rstrip(".").removeprefix("Return ")
    return line[:1].upper() + line[1:]


def _docstring_of(definition: ast.Module) -> str:
    """Return the docstring inside of a class or function, or below an object."""
    match definition.body:
        case [ast.ClassDef() | ast.FunctionDef() as node]:
            return ast.get_docstring(node) or ""
        case [ast.Assign(), ast.Expr(value=ast.Constant(value=str(text)))]:
            return text.strip()
    return ""


def _imported_from(text: str, name: str, package: str) -> str:
    """Return the module that a file imports a name from; empty if it does not.

    Args:
        text: Of the file.
        name: That is imported.
        package: That the file belongs to.
    """
    for found in IMPORT.finditer(text):
        module, names = found.groups()
        if re.search(rf"\b{name}\b", names):
            return resolve_name(module, package)
    return ""
