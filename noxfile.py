"""What a contributor and the continuous integration run.

`uv run nox -s NAME` runs one session, `uv run nox -l` lists them. The members of the
workspace are found in the folders, never listed.
"""

import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PATTERNS = nox.project.load_toml(ROOT / "pyproject.toml")["tool"]["uv"]["workspace"]["members"]
MEMBERS: list[str] = []
for pattern in PATTERNS:
    MEMBERS += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]
PLUGINS = [Path(member).name for member in MEMBERS if member.startswith("plugins/")]
TEST_ENVIRONMENT = {
    # The tests' tensors are small, and threads that wait for each other cost more.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # The tests start hundreds of interpreters: let each find what an earlier one compiled.
    "PYTHONDONTWRITEBYTECODE": "",
}
# Whole files go to one process each: many of them make something that all of their tests use.
# They keep their order, which is that of conftest.py: what takes long begins first.
ON_ALL_CORES = (
    *("-n", "auto", "--maxprocesses", "4"),
    *("--dist", "loadfile", "--no-loadscope-reorder"),
)
# What builds the members; uv refuses a file whose hash is another.
BUILD_REQUIREMENTS = ("--build-constraints", "release/build-requirements.txt")
KIT = "packages/testing"
NOT_FOR_A_PLUGIN = {"accelerate", "mlflow", "torchvision"}
FAIL_IF_IMPORTABLE = """
import importlib.util, sys
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
if found:
    sys.exit(f"importable, but not declared: {found}")
"""

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.reuse_existing_virtualenvs = True


def metadata(member: str) -> dict:
    """Return the `[project]` table of a member."""
    return nox.project.load_toml(ROOT / member / "pyproject.toml")["project"]


def needed_members(member: str) -> list[str]:
    """Return a member, the members that it declares, and those that they declare in turn."""
    by_project = {metadata(other)["name"]: other for other in MEMBERS}
    needed = [member]
    for other in needed:  # grows while it is read
        for name in dependencies(other):
            if name in by_project and by_project[name] not in needed:
                needed.append(by_project[name])
    return needed


def dependencies(member: str) -> list[str]:
    """Return the names of the distributions that a member declares."""
    lines = metadata(member)["dependencies"]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]


def import_name(member: str) -> str:
    """Return the name by which a member is imported."""
    return next((ROOT / member / "src").glob("*/__init__.py")).parent.name


def sync(session: nox.Session, *groups: str) -> None:
    """Install every member, editable, with pinned versions and some dependency groups."""
    wanted = [f"--group={group}" for group in groups]
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


def with_paths(words: list[str]) -> list[str]:
    """Return arguments for pytest in which the name of a member's folder is its path."""
    paths = {Path(member).name: member for member in MEMBERS}
    arguments = []
    for before, word in zip(["", *words], words, strict=False):
        is_expression = before in ("-k", "-m")
        arguments.append(word if is_expression else paths.get(word, word))
    return arguments


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests and doctests, or those of the members that are named, as in `-- core`."""
    sync(session, "test", "extras", "browser", "docs")
    session.run("pytest", *ON_ALL_CORES, *with_paths(session.posargs), env=TEST_ENVIRONMENT)


@nox.session
@nox.parametrize("plugin", PLUGINS)
def isolation(session: nox.Session, plugin: str) -> None:
    """Run one plugin's tests with its dependencies and the conformance kit, and nothing else."""
    member = f"plugins/{plugin}"
    needed = [*dict.fromkeys((*needed_members(member), *needed_members(KIT)))]
    session.install(*build_wheels(session, *needed), "--group", "test")
    session.run("python", "-c", FAIL_IF_IMPORTABLE, *sorted(undeclared(needed)))
    session.run("pytest", f"{member}/tests", *session.posargs, env=TEST_ENVIRONMENT)


def undeclared(members: list[str]) -> set[str]:
    """Return what must not be importable where only some members are installed."""
    declared: set[str] = set()
    for member in members:
        declared |= {*dependencies(member)}
    others = {import_name(other) for other in MEMBERS if other not in members}
    return others | {name for name in NOT_FOR_A_PLUGIN if name not in declared}


@nox.session
def together(session: nox.Session) -> None:
    """Run the core's tests with every plugin installed: installing must not mean activating."""
    members = ["core", KIT, *(f"plugins/{plugin}" for plugin in PLUGINS)]
    session.install(*build_wheels(session, *members), "--group", "test")
    session.run("pytest", "core/tests", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def author(session: nox.Session) -> None:
    """Walk the way of a plugin's author: make one, edit its rule, install, check, compare."""
    members = ["core", KIT, "packages/runner", "plugins/centralization"]
    session.install(*build_wheels(session, *members), "uv")
    folder = Path(session.create_tmp()) / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    session.chdir(folder)
    script = ROOT / "docs" / "examples" / "author.sh"
    # The script's `uv pip` must find this session's environment, not one of whoever started nox.
    place = {"VIRTUAL_ENV": str(session.virtualenv.location)}
    session.run("bash", str(script), external=True, env=TEST_ENVIRONMENT | place)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Install DeepSpeed for CPUs, which nothing else here needs, and prove its layout.

    It builds the little that it needs at its first start, and wants a C++ compiler for that.
    """
    sync(session, "test")
    for_cpus = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    member = "packages/deepspeed"
    needed = metadata(member)["optional-dependencies"]["deepspeed"]
    session.install("setuptools", "wheel", "ninja")
    session.install("--no-build-isolation", *needed, env=for_cpus)
    session.run("pytest", member, *session.posargs, env=TEST_ENVIRONMENT | for_cpus)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run every test with the lowest versions that the members allow."""
    members = []
    for member in MEMBERS:
        # "-r" makes the member's dependencies direct, so that "lowest-direct" means them.
        members += ["-r", f"{member}/pyproject.toml", "-e", member]
    # "--no-config" leaves the pins out.
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
    """Check the types of every member's source, of the documentation's programs, and of options."""
    sync(session, "typecheck", "docs", "test")
    sources = [f"{member}/src" for member in MEMBERS]
    programs = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.py"))]
    session.run("mypy", "--strict", *sources, *programs, "docs/gpu", "tests/typed_options.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    sync(session, "docs")
    session.run("python", "docs/corrections_table.py", "--check")
    session.run("python", "docs/reference.py", "--check")
    session.run("python", "docs/interactions.py", "--check", env=TEST_ENVIRONMENT)
    session.run("python", "docs/results_tables.py", "--check")
    session.run("python", "docs/sharding.py", "--check")
    made = "docs/_build/html"
    strict = ("-W", "--keep-going")
    session.run("sphinx-build", *strict, "-b", "html", "docs", made, *session.posargs)
    session.run("python", "docs/loaded.py", made)


@nox.session
def sharding(session: nox.Session) -> None:
    """Measure every correction on every layout, on up to four processes; write page and cards.

    With `-- --prove` nothing is written, and another verdict than the page's is an error.
    """
    sync(session, "test")
    session.run("python", "docs/sharding.py", *session.posargs, env=TEST_ENVIRONMENT)


@nox.session
def release(session: nox.Session) -> None:
    """Build every member into dist/, by requirements pinned by hash.

    With `-- --check` each file is proved too: what it holds, what it says, and that it works in
    an environment with nothing but what it needs. `--built` proves what lies in dist/ already,
    and `--tag TAG` also asks for what a release of that tag must say.
    """
    given = [*session.posargs]
    if "--built" not in given:
        folder = ("--clear", "--out-dir", "dist")
        pinned = (*BUILD_REQUIREMENTS, "--require-hashes")
        session.run_install("uv", "build", "--all-packages", *folder, *pinned)
    if "--check" not in given:
        return
    session.install("--group", "release")
    built = sorted(str(path) for path in Path("dist").glob("regrad*"))
    session.run("twine", "check", "--strict", *built)
    words = [word for word in given if word not in ("--check", "--built")]
    session.run("python", "release/check.py", "dist", *words)
    for member in MEMBERS:
        install_alone(session, member)


def install_alone(session: nox.Session, member: str) -> None:
    """Prove a member's wheel, then its source distribution, in an environment of its own."""
    project = metadata(member)
    package = import_name(member)
    stem = f"dist/{package}-{project['version']}"
    wheels: list[str] = []
    for other in needed_members(member):
        wheels += [str(path) for path in Path("dist").glob(f"{import_name(other)}-*.whl")]
    place = Path(session.create_tmp()) / "alone"
    python = str(place / "bin" / "python")
    interpreter = str(Path(session.bin) / "python")
    pip = ["uv", "pip", "install", "--quiet", "--python", python]
    session.run_install("uv", "venv", "--quiet", "--clear", "--python", interpreter, str(place))
    session.run_install(*pip, *wheels)
    session.run_install("uv", "pip", "check", "--quiet", "--python", python)
    probe = ["release/installed.py", project["name"], package]
    session.run(python, "-I", *probe, external=True)
    again = ["--no-deps", "--reinstall", *BUILD_REQUIREMENTS]
    session.run_install(*pip, *again, f"{stem}.tar.gz")
    compare = ["release/same_files.py", f"{stem}-py3-none-any.whl"]
    session.run(python, "-I", *compare, external=True)
