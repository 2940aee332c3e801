"""The pages as they are built: nothing is loaded from a network, and formulas are drawn."""

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("sphinx", "furo", "myst_parser", "math_core")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
WAIT = 240_000  # milliseconds: a browser that starts on a busy machine takes a minute
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: uv sync --group docs"),
    pytest.mark.timeout(600),  # the build takes 25 s on an idle machine
]

sys.path.insert(0, str(ROOT / "docs"))
loaded = importlib.import_module("loaded")
sys.path.remove(str(ROOT / "docs"))


class Text(HTMLParser):
    """Collects what a reader sees of a page outside of code."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self._hidden = "", 0

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in {"pre", "code", "script", "style"}

    def handle_endtag(self, tag):
        self._hidden -= tag in {"pre", "code", "script", "style"}

    def handle_data(self, data):
        self.seen += "" if self._hidden else data


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The documentation, built as `nox -s docs` builds it."""
    folder = tmp_path_factory.mktemp("built") / "html"
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(source: Path, target: Path) -> subprocess.CompletedProcess:
    """Build pages as `nox -s docs` does."""
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", f"{target}-seen"]
    return subprocess.run(
        [sys.executable, *command, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def browser():
    tool = pytest.importorskip("playwright.sync_api", reason="uv sync --group browser")
    if CHROMIUM is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with tool.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT
        )
        yield started
        started.close()


def test_no_built_page_loads_anything_from_a_network(built):
    assert len(list(built.rglob("*.html"))) > 40
    assert loaded.loaded_in(built) == []


def test_no_formula_is_left_as_it_was_typed(built):
    formulas = 0
    for path in built.rglob("*.html"):
        page = Text()
        page.feed(path.read_text(encoding="utf-8"))
        formulas += path.read_text(encoding="utf-8").count("<math")
        assert re.findall(r"\\[a-zA-Z]+|\\\(|\$\$|\[\d+ex\]", page.seen) == [], path.name
    assert formulas > 100


@pytest.mark.parametrize("name", ["index", "api", "methods/xgrad", "methods/clipping"])
def test_a_page_opened_without_a_network_asks_for_nothing_and_draws_its_formulas(
    built, browser, name
):
    context = browser.new_context(offline=True, viewport={"width": 360, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((built / f"{name}.html").as_uri())
    tab.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert said == []
    sizes = tab.eval_on_selector_all(
        "math", "all => all.map(one => one.getBoundingClientRect().height)"
    )
    assert bool(sizes) is (name != "index")
    assert min(sizes, default=9) > 5
    fonts = tab.evaluate("() => [...document.fonts].map(font => [font.family, font.status])")
    assert fonts == [["Latin Modern Math", "loaded" if sizes else "unloaded"]]
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 360
    context.close()


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (r":math:`\nosuch x`", "formula must be LaTeX that math-core knows"),
        (".. math:: x\n   :label: first", "formulas cannot be numbered"),
    ],
)
def test_a_formula_that_cannot_be_drawn_fails_the_build_with_its_place(tmp_path, page, said):
    conf = "import sys\nsys.path.insert(0, {!r})\nextensions = ['formulas']\n"
    (tmp_path / "conf.py").write_text(
        conf.format(str(ROOT / "docs")) + "html_math_renderer = 'mathml'\n", encoding="utf-8"
    )
    (tmp_path / "index.rst").write_text(f"Title\n=====\n\n{page}\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "html")
    assert done.returncode != 0
    assert said in done.stderr
    assert "index.rst:4" in done.stderr
