import shutil

import pytest
from regrad_runner.reporting.page.write import write_page
from regrad_runner.reporting.report_data import read_report_data
from regrad_runner.reporting.summaries import summarize_results
from regrad_runner.workloads.workload import Measure

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: uv sync --group browser"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
    pytest.mark.timeout(600),  # a browser that starts on a busy machine takes a minute
]
WAIT = 240_000  # milliseconds, for the same reason


@pytest.fixture(scope="module")
def address(make_comparison, tmp_path_factory):
    folder = make_comparison(tmp_path_factory.mktemp("browser") / "it's a <folder>")
    measure = Measure(target=0.9)
    data = read_report_data(folder, measure, summarize_results(folder.results, measure))
    return write_page(data)[0].as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as tool:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"], "timeout": WAIT}
        started = tool.chromium.launch(**options)
        yield started
        started.close()


@pytest.fixture(scope="module")
def seen(browser, address):
    """Open the page once and note whatever it says, asks for or shows by itself."""
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    tab.set_default_timeout(WAIT)
    noted = {"console": [], "errors": [], "requests": [], "dialogs": []}
    tab.on("console", lambda message: noted["console"].append(message.text))
    tab.on("pageerror", lambda error: noted["errors"].append(str(error)))
    tab.on("request", lambda request: noted["requests"].append(request.url))
    tab.on("dialog", lambda dialog: (noted["dialogs"].append(dialog.message), dialog.dismiss()))
    tab.goto(address)
    tab.wait_for_load_state("networkidle")
    tab.noted = noted
    yield tab
    tab.close()


@pytest.fixture
def page(seen):
    """Return the page as it is when it was just opened."""
    seen.emulate_media(color_scheme="light", media="screen")
    seen.set_viewport_size({"width": 1000, "height": 800})
    seen.reload()
    return seen


def column(page, table, place):
    return page.eval_on_selector_all(
        f"{table} tbody tr", f"rows => rows.map(row => row.cells[{place}].textContent)"
    )


def test_opening_the_page_says_nothing_on_the_console_and_asks_the_network_for_nothing(
    page, address
):
    assert page.noted["console"] == page.noted["errors"] == page.noted["dialogs"] == []
    assert {url for url in page.noted["requests"] if not url.startswith("data:")} == {address}


def test_names_that_look_like_html_are_text_in_the_browser_too(page, names):
    assert page.locator("img, body b, iframe, object").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator("#verdicts .arm").all_text_contents() == [
        *names.arms[1:4],
        "baseline",
        "nesterov",
    ]
    assert column(page, "#differences table", 0) == list(names.arms)
    assert page.title().startswith(names.script)
    assert page.noted["dialogs"] == []


def test_what_a_page_must_not_do_its_policy_stops(page):
    added = "s = document.createElement('script'); s.textContent = 'window.acted = 1'; document.body.append(s)"
    page.evaluate(f"() => {{ const {added}; }}")
    page.evaluate(
        "() => document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x.png>')"
    )
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    assert page.evaluate("() => window.acted") is None
    assert any("Content Security Policy" in text for text in page.noted["console"])
    for notes in page.noted.values():
        notes.clear()


def test_a_table_sorts_by_a_click_and_by_the_keyboard(page, names):
    table = "#differences table"
    heading = page.locator(f"{table} thead th", has_text="Test accuracy")
    place = heading.evaluate("cell => cell.cellIndex")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    values = column(page, table, place)
    assert values == sorted(values, key=float)
    assert len(set(values)) > 2
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, table, place) == values[::-1]
    first = page.locator(f"{table} thead th").first
    first.locator("button").click()
    assert (first.get_attribute("aria-sort"), heading.get_attribute("aria-sort")) == (
        "ascending",
        None,
    )
    assert set(column(page, table, 0)) == set(names.arms)


def test_what_has_no_number_comes_last_in_either_direction(page):
    table = "#differences table"
    heading = page.locator(f"{table} thead th", has_text="Difference from")
    place = heading.evaluate("cell => cell.cellIndex")
    for _ in range(2):
        heading.locator("button").click()
        values = column(page, table, place)
        assert values[-1] == "–"
        assert "–" not in values[:-1]


def luminance(page, selector, what):
    colour = page.eval_on_selector(selector, f"element => getComputedStyle(element).{what}")
    return sum(map(float, colour.removeprefix("rgb(").rstrip(")").split(","))) / 765


def test_the_theme_follows_the_system_in_the_figures_too(page):
    words, line = "svg.figure text", "#training svg.figure path[stroke='var(--ink)']"
    for theme, background in (("light", 1.0), ("dark", 0.1)):
        page.emulate_media(color_scheme=theme)
        paper = luminance(page, "body", "backgroundColor")
        assert paper == pytest.approx(background, abs=0.05)
        assert abs(luminance(page, words, "fill") - paper) > 0.6
        assert abs(luminance(page, line, "stroke") - paper) > 0.6
    page.emulate_media(color_scheme="dark", media="print")
    assert luminance(page, "body", "backgroundColor") == 1.0
    assert luminance(page, words, "fill") < 0.2


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_overflows_the_page(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter(element => !element.closest(".scroll, svg"))
            .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
            .map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert (
        page.locator(".scroll").first.evaluate("box => box.getBoundingClientRect().right") <= width
    )


def test_figures_can_be_read_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 800})
    heights = page.eval_on_selector_all(
        "svg.figure text",
        """texts => texts.map(text => {
            const to = text.getScreenCTM();
            return parseFloat(text.getAttribute("font-size")) * Math.hypot(to.a, to.b);
        })""",
    )
    assert min(heights) >= 8
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("svg.figure")].flatMap(figure => [...figure.querySelectorAll("text")]
            .filter(text => { const box = text.getBoundingClientRect(), own = figure.getBoundingClientRect();
                              return box.left < own.left - 1 || box.right > own.right + 1; })
            .map(text => text.textContent))"""
    )
    assert beyond == []


def test_the_page_is_whole_without_scripts(browser, address, names):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.goto(address)
    assert tab.locator("figure svg").count() == 13
    assert tab.locator("#differences tbody tr").count() == len(names.arms)
    assert tab.locator("th button").count() == 0
    context.close()


def test_every_picture_has_a_name_for_those_who_do_not_see_it(page):
    told = page.get_by_role("img").evaluate_all(
        "pictures => pictures.map(picture => picture.querySelector('desc').textContent)"
    )
    assert len(told) == 13
    assert all(len(text) > 40 for text in told)
    assert page.get_by_role("img", name="Time per step", exact=False).count() >= 1
