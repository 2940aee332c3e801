"""The documentation says what is there: its code runs, its tables are fresh, nothing is missing from it."""

import ast
import functools
import importlib
import operator
import re
import sys
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
pages = importlib.import_module("blocks")
sys.path.remove(str(ROOT / "docs"))
PAGES = pages.pages()
WRITTEN = (
    "corrections_table",
    "reference",
    "results_tables",
)  # what is quick; nox -s docs checks all


def blocks(page: Path, language: str) -> list:
    return [block for block in pages.blocks(page) if block.language == language]


@pytest.fixture
def user(tmp_path, monkeypatch) -> dict:
    """What a reader is told to have: a model, its optimizer, a criterion and data."""
    import regrad
    import torch

    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    inputs, targets = (
        torch.randn(24, 12, generator=generator),
        torch.randint(5, (24,), generator=generator),
    )
    return {
        "regrad": regrad,
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": list(zip(inputs.split(6), targets.split(6), strict=True)),
    }


@pytest.fixture
def detached(monkeypatch):
    """Detach at the end what the code of a page attaches: it may stand in torch's functions."""
    import regrad

    attach = regrad.attach
    made = []

    def kept(*arguments, **options):
        made.append(attach(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(regrad, "attach", kept)
    yield
    for attachment in made:
        attachment.detach()


@pytest.mark.usefixtures("detached")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, user, monkeypatch):
    module = type(sys)("page")
    module.__dict__.update(user)
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page, "python"):
        # Empty lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), module.__dict__)


def test_the_readme_adds_one_line_to_a_loop_and_both_corrections_act(user):
    (block,) = blocks(ROOT / "README.md", "diff")
    lines = block.text.splitlines()
    added = [line[1:] for line in lines if line.startswith("+")]
    loop = [line[1:] for line in lines if line.startswith(" ")]
    assert (len(added), len(added) + len(loop)) == (1, len(lines))
    exec(compile("\n".join(loop), "README.md, before", "exec"), dict(user))
    before = [parameter.detach().clone() for parameter in user["model"].parameters()]
    exec(compile("\n".join(added + loop), "README.md, after", "exec"), user)
    metrics = user["attachment"].metrics()
    assert metrics["steps_applied"] == len(user["loader"])
    assert metrics["xgrad/weights/share_touched"] > 0
    assert metrics["centralization/gradient/share_touched"] > 0
    assert not any(map(user["torch"].equal, before, user["model"].parameters()))


def test_the_readme_is_cited_as_the_citation_file_says():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (block,) = blocks(ROOT / "README.md", "bibtex")
    fields = dict(re.findall(r"^  (\w+) = \{+([^{}]+)\}+,?$", block.text, flags=re.MULTILINE))
    assert fields == {
        "title": citation["title"],
        "author": citation["authors"][0]["name"],
        "version": citation["version"],
        "license": citation["license"],
    }


def test_the_badges_of_the_readme_name_the_pythons_that_are_tested_and_a_workflow_that_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for workflow in re.findall(r"actions/workflows/(\w+\.yml)", text):
        tested = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    pythons = re.findall(r'"(3\.\d+)"', tested.partition("python: [")[2].partition("]")[0])
    assert f"![Python {pythons[0]} to {pythons[-1]}](" in text


@pytest.mark.parametrize("script", WRITTEN)
def test_what_is_written_from_the_code_and_the_results_is_fresh(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "docs")
    code = importlib.import_module(script).main(["--check"])
    assert (code, capsys.readouterr().err) == (0, "")


def test_every_page_that_a_script_writes_is_checked_when_the_pages_are_built():
    scripts = [
        path.name
        for path in (ROOT / "docs").glob("*.py")
        if "--check" in path.read_text(encoding="utf-8")
    ]
    session = (
        (ROOT / "noxfile.py")
        .read_text(encoding="utf-8")
        .partition("def docs(")[2]
        .partition("@nox")[0]
    )
    assert {f"{script}.py" for script in WRITTEN} < set(scripts)
    assert [name for name in scripts if f'"docs/{name}", "--check"' not in session] == []


def test_the_first_screen_of_the_readme_has_the_two_commands_and_the_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python -m pip install uv && uv run --all-packages regrad compare\n" in text
    assert "python -m pip install uv && uv run nox -s tests\n" in text
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", text.replace("badge.svg", ""))
    assert (ROOT / picture).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_link_to_a_file_leads_somewhere(page):
    # Beside a repository, not in it, stand what its workflows did: GitHub's own pages.
    relative = r"\]\((?!https?:|#|\.\./\.\./actions/)([^)#]+)"
    for target in re.findall(relative, page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_reads_of_an_attachment_is_there(page, user):
    attachment = user["regrad"].attach(user["model"], user["optimizer"], [], user["criterion"])
    named = re.findall(r"\battachment((?:\.[a-z]\w*)+)", page.read_text(encoding="utf-8"))
    for path in {*named}:
        operator.attrgetter(path[1:])(attachment)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_holds_no_mark_that_a_fixed_width_font_would_misplace(page):
    """A combining mark, such as a hat, stands beside its letter there, or is lost."""
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    code = [block.text for block in pages.blocks(page)] + spans
    assert [text for text in code if any(map(unicodedata.combining, text))] == []


def test_every_public_name_is_in_the_api_page():
    import regrad

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in dir(regrad) if f"regrad.{name}" not in text] == []


def test_every_plugin_has_its_page(plugin):
    page = ROOT / "docs" / "methods" / f"{plugin.path.name}.md"
    assert f"plugins/{plugin.path.name}/README.md" in page.read_text(encoding="utf-8")


def test_a_methods_page_derives_the_rule_says_when_it_helps_and_types_no_result_by_hand(plugin):
    text = (ROOT / "docs" / "methods" / f"{plugin.path.name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        "Derivation",
        "When it helps, and when not",
    ]
    assert "$$" in text
    by_hand = re.sub(r"<!-- written by .*?<!-- end", "", text, flags=re.DOTALL)
    assert re.findall(r"[+−-]\.\d{2,}|± *\.\d", by_hand) == [], (
        "results are written by docs/results_tables.py"
    )


def test_what_is_said_of_peers_names_tests_that_exist():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 3
    assert named - functions_of("packages/bench/tests/test_coming_from.py") == set()


def test_a_methods_page_names_tests_that_exist(plugin):
    text = (ROOT / "docs" / "methods" / f"{plugin.path.name}.md").read_text(encoding="utf-8")
    folder = plugin.path / "tests"
    known = set().union(
        *(functions_of(str(path.relative_to(ROOT))) for path in folder.glob("test_*.py"))
    )
    assert [name for name in re.findall(r"`(test_\w+)`", text) if name not in known] == []
    for path, name in re.findall(r"`([\w/]+\.py)::(test_\w+)`", text):
        assert name in functions_of(path), f"{path}::{name}"


def test_every_fault_names_a_test_that_exists():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (?!seen|---)", line)]
    assert len(rows) > 100
    for row in rows:
        (named,) = re.findall(r"\| `([\w/]+\.py)::(\w+)` \|$", row)
        path, name = named
        assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (
            row
        )


def test_every_trap_names_tests_that_exist():
    text = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
    traps = re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]
    assert traps
    for trap in traps:
        lines = [line for line in trap.splitlines() if line.startswith("- ")]
        named = re.findall(
            r"^- `([\w/]+\.py)::((?:test|case)_\w+)`$", "\n".join(lines), flags=re.MULTILINE
        )
        reasons = [line for line in lines if re.match(r"- not tested: \w{2,} ", line)]
        assert lines, f"no test: {trap}"
        assert len(named) + len(reasons) == len(lines), (
            f"must be `path::test` or 'not tested: why': {trap}"
        )
        missing = [f"{path}::{name}" for path, name in named if name not in functions_of(path)]
        assert missing == [], trap


@functools.cache
def functions_of(path: str) -> set[str]:
    """Names of the functions in a file of the repository; none where there is no such file."""
    file = ROOT / path
    tree = ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_shipped_correction_and_optimizer_has_a_claim_in_the_ledger():
    import regrad
    import yaml

    claims = yaml.safe_load((ROOT / "docs" / "results" / "claims.yaml").read_text(encoding="utf-8"))
    shipped = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    entries = [
        entry
        for group in ("regrad", "regrad.optimizers")
        for entry in regrad.available(group).values()
    ]
    told = {
        entry.distribution.removeprefix("regrad-")
        for entry in entries
        if entry.name in {c["method"] for c in claims}
    }
    assert told >= shipped
