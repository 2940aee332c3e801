"""Who may import whom: read from the source files, so that a lazy import counts as well."""

import ast
import graphlib
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest


def imported(path) -> set[str]:
    """Top-level names that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.fixture
def imports(member) -> set[str]:
    return set().union(*map(imported, member.sources)) - {member.package}


def test_the_core_imports_torch_and_pluggy_and_nothing_else(members):
    (core,) = [m for m in members if m.folder == "core"]
    assert set().union(*map(imported, core.sources)) == {"regrad", "torch", "pluggy"}
    assert core.dependencies == {"torch", "pluggy"}


def test_the_kit_adds_pytest_and_nothing_else(members):
    (kit,) = [m for m in members if m.folder == "packages/testing"]
    assert set().union(*map(imported, kit.sources)) == {
        "regrad",
        "regrad_testing",
        "torch",
        "pytest",
    }
    assert kit.dependencies == {"regrad", "torch", "pytest"}


def test_nobody_imports_or_names_the_package_of_a_plugin(member, members):
    others = {m.package for m in members if m.is_plugin} - {member.package}
    named = re.compile(rf"\b(?:{'|'.join(others)})\b")
    assert [path.name for path in member.sources if named.search(path.read_text())] == []


def test_a_plugin_imports_no_member_but_the_core(plugin, members):
    others = {m.package for m in members if m.folder != "core"} - {plugin.package}
    assert set().union(*map(imported, plugin.sources)) & others == set()


def imports_between(member) -> dict[str, set[str]]:
    """Return which of a member's modules imports which, in functions and under TYPE_CHECKING too.

    A package counts where something is imported from its `__init__.py`, not where Python passes
    through it on the way to a module inside.
    """
    source = member.path / "src"
    dotted = {
        path: ".".join(path.relative_to(source).with_suffix("").parts) for path in member.sources
    }
    modules = {path: name.removesuffix(".__init__") for path, name in dotted.items()}
    known = set(modules.values())
    graph = {}
    for path, module in modules.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module for name in inside]
            graph[module] |= known.intersection(names)
    return graph


def test_no_modules_of_a_member_import_each_other_in_a_circle(member):
    circle = []
    try:
        graphlib.TopologicalSorter(imports_between(member)).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert circle == [], f"{member.folder}: {' is imported by '.join(circle)}"


def listed_rooms(root, heading: str) -> dict[str, int]:
    """Return the rooms that a table of CONTRIBUTING.md names, each with its line from the top."""
    text = (root / "CONTRIBUTING.md").read_text()
    section = text.partition(heading)[2].partition("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return {name: line for line, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    ("folder", "heading"),
    [("core", "### The rooms of the core"), ("packages/runner", "### The rooms of the runner")],
)
def test_rooms_are_listed_and_import_only_what_is_listed_below_them(members, root, folder, heading):
    (member,) = [m for m in members if m.folder == folder]
    lines = listed_rooms(root, heading)
    graph = imports_between(member)
    room_of = {module: module.split(".")[1] for module in graph if "." in module}
    assert lines.keys() == {*room_of.values()} - {"__main__"}
    for module, room in room_of.items():
        if room == "__main__":
            continue
        upward = [other for other in graph[module] if lines[room_of[other]] < lines[room]]
        assert upward == [], f"{module} imports what stands above it"


# Public names that several modules of a member may define, and why.
SHARED_NAMES = {
    "main": "what a module that is run as a program starts with",
    "load": "what an entry point of a workload names",
}


def defined_in(path) -> set[str]:
    """Public names that a module defines at its top level; what it imports is not among them."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_no_two_modules_of_a_member_define_the_same_public_name(member):
    places = {}
    for path in member.sources:
        for name in defined_in(path) - SHARED_NAMES.keys():
            places.setdefault(name, []).append(path.relative_to(member.path).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_everything_imported_is_declared_by_the_member_itself(
    member, members, imports, normal_name
):
    distributions = {m.package: [m.project["name"]] for m in members}
    for name in imports:
        offered_by = {
            normal_name(d)
            # What an extra names may not be installed, and then goes by its own name.
            for d in distributions.get(name) or packages_distributions().get(name, [name])
        }
        assert offered_by & (member.dependencies | member.optional_dependencies), (
            f"{member.folder} imports {name} ({offered_by}) without declaring it"
        )


def test_importing_the_core_and_listing_plugins_imports_no_heavy_library():
    body = (
        "import sys, regrad; regrad.available(); regrad.available('regrad.workloads'); "
        "print(sorted({'torch', 'numpy', 'accelerate', 'mlflow', 'pydantic', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", body], text=True) == "[]\n"
