"""What a contributor and the continuous integration run: `uv run nox -s NAME`; `uv run nox -l` lists the names.

The members of the workspace are found in the folders, never listed.
"""

import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PATTERNS = nox.project.load_toml(ROOT / "pyproject.toml")["tool"]["uv"]["workspace"]["members"]
MEMBERS = [
    path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))
]
PLUGINS = [Path(member).name for member in MEMBERS if member.startswith("plugins/")]
# One computing thread per process: the tests' tensors are small, and threads that wait for each other cost more.
TEST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Whole files go to one process each: many of them make something that all of their tests use.
ON_ALL_CORES = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
KIT = "packages/testing"
NOT_FOR_A_PLUGIN = {"accelerate", "mlflow", "torchvision"}

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.reuse_existing_virtualenvs = True


def metadata(member: str) -> dict:
    """Return the `[project]` table of a member."""
    return nox.project.load_toml(ROOT / member / "pyproject.toml")["project"]


def needed_members(member: str) -> list[str]:
    """Return the members that a member declares, and those that they declare, itself and the core included."""
    projects = {metadata(other)["name"]: other for other in MEMBERS}
    needed = [member]
    for other in needed:  # grows while it is read
        declared = [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in metadata(other)["dependencies"]
        ]
        needed += [
            projects[name] for name in declared if name in projects and projects[name] not in needed
        ]
    return needed


def import_name(member: str) -> str:
    """Return the name by which a member is imported."""
    return next((ROOT / member / "src").glob("*/__init__.py")).parent.name


def sync(session: nox.Session, *groups: str) -> None:
    """Install every member, editable, with the pinned development versions and some dependency groups."""
    wanted = [argument for group in groups for argument in ("--group", group)]
    place = session.virtualenv.location
    command = ["uv", "sync", "--all-packages", "--no-default-groups", f"--python={place}", *wanted]
    session.run_install(*command, env={"UV_PROJECT_ENVIRONMENT": place})


def build_wheels(session: nox.Session, *members: str) -> list[str]:
    """Build wheels of some members and return their paths."""
    folder = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    for member in members:
        session.run_install("uv", "build", "--wheel", "--out-dir", str(folder), member, silent=True)
    return [str(path.resolve()) for path in folder.glob("*.whl")]


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test of every member and the doctests, with everything installed."""
    sync(session, "test", "browser", "docs")
    session.run("pytest", *ON_ALL_CORES, *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
@nox.parametrize("plugin", PLUGINS)
def isolation(session: nox.Session, plugin: str) -> None:
    """Run one plugin's tests where only the core, the conformance kit and what the plugin declares are installed."""
    member = f"plugins/{plugin}"
    needed = [*dict.fromkeys((*needed_members(member), *needed_members(KIT)))]
    session.install(*build_wheels(session, *needed), "--group", "test")
    allowed = {import_name(other) for other in needed}
    declared = " ".join(line for other in needed for line in metadata(other)["dependencies"])
    forbidden = {import_name(other) for other in MEMBERS} - allowed
    forbidden |= {name for name in NOT_FOR_A_PLUGIN if name not in declared}
    check = (
        "import importlib.util, sys; "
        "found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]; "
        "sys.exit(f'importable, but not declared: {found}' if found else 0)"
    )
    session.run("python", "-c", check, *sorted(forbidden))
    session.run("pytest", f"{member}/tests", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def together(session: nox.Session) -> None:
    """Run the core's tests where every plugin is installed: installing must not mean activating."""
    members = ["core", *(f"plugins/{plugin}" for plugin in PLUGINS)]
    session.install(*build_wheels(session, *members), "--group", "test")
    session.run("pytest", "core/tests", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def author(session: nox.Session) -> None:
    """Walk the way of a plugin's author in an empty folder: make one, edit its rule, install, check, compare."""
    members = ["core", KIT, "packages/runner", "plugins/centralization"]
    session.install(*build_wheels(session, *members), "uv")
    folder = Path(session.create_tmp()) / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    session.chdir(folder)
    # The script's `uv pip` must find this session's environment, not one of whoever started nox.
    place = {"VIRTUAL_ENV": str(session.virtualenv.location)}
    session.run(
        "bash",
        str(ROOT / "docs" / "examples" / "author.sh"),
        external=True,
        env=TEST_ENVIRONMENT | place,
    )


@nox.session
def minimums(session: nox.Session) -> None:
    """Run every test with the lowest versions that the members allow."""
    # "-r" makes a member's dependencies direct, so that lowest-direct means them; "--no-config" leaves the pins out.
    members = [
        text for member in MEMBERS for text in ("-r", f"{member}/pyproject.toml", "-e", member)
    ]
    session.install("--no-config", "--resolution", "lowest-direct", *members, "--group", "test")
    session.run("pytest", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and the shell in scripts and on the pages."""
    session.install("--group", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("shellcheck", ".ci/run", *map(str, sorted(ROOT.glob("docs/**/*.sh"))))
    session.run("python", "docs/blocks.py")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of every member's source, and what a checker sees of options."""
    sync(session, "typecheck")
    sources = [f"{member}/src" for member in MEMBERS]
    session.run("mypy", "--strict", *sources, "tests/typed_options.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    sync(session, "docs")
    session.run("python", "docs/corrections_table.py", "--check")
    session.run("python", "docs/reference.py", "--check")
    session.run("python", "docs/interactions.py", "--check", env=TEST_ENVIRONMENT)
    session.run("python", "docs/results_tables.py", "--check")
    session.run("python", "docs/sharding.py", "--check")
    session.run(
        "sphinx-build",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "docs",
        "docs/_build/html",
        *session.posargs,
    )
    session.run("python", "docs/loaded.py", "docs/_build/html")


@nox.session
def sharding(session: nox.Session) -> None:
    """Measure every correction on every layout, on two processes, and write the page and the cards.

    With `-- --prove` nothing is written, and another verdict than the page's is an error.
    """
    sync(session, "test")
    session.run("python", "docs/sharding.py", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def build(session: nox.Session) -> None:
    """Build wheels and source distributions of every member into dist/."""
    session.run_install("uv", "build", "--all-packages", "--clear", "--out-dir", "dist")
