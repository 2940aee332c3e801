import shutil
from itertools import pairwise

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
TABLE = "#numbers > .scroll table"
FIGURES = 16
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


def keys(page, table, place):
    return page.eval_on_selector_all(
        f"{table} tbody tr", f"rows => rows.map(row => Number(row.cells[{place}].dataset.key))"
    )


def unfold(page):
    page.evaluate(
        "() => document.querySelectorAll('details').forEach(part => { part.open = true; })"
    )


def test_opening_the_page_says_nothing_on_the_console_and_asks_the_network_for_nothing(
    page, address
):
    assert page.noted["console"] == page.noted["errors"] == page.noted["dialogs"] == []
    assert {url for url in page.noted["requests"] if not url.startswith("data:")} == {address}


def test_names_that_look_like_html_are_text_in_the_browser_too(page, names):
    assert page.locator("img, body b, iframe, object").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator(".verdicts .arm").all_text_contents() == [
        *names.arms[1:4],
        "baseline",
        "nesterov",
    ]
    baseline, script, image, long, nesterov = names.arms
    assert column(page, TABLE, 0) == [baseline, script, nesterov, image, long]
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
    table = TABLE
    heading = page.locator(f"{table} thead th", has_text="Test accuracy")
    place = heading.evaluate("cell => cell.cellIndex")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    values = keys(page, table, place)
    assert values == sorted(values)
    assert len(set(values)) > 2
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert keys(page, table, place) == values[::-1]
    first = page.locator(f"{table} thead th").first
    first.locator("button").click()
    assert (first.get_attribute("aria-sort"), heading.get_attribute("aria-sort")) == (
        "ascending",
        None,
    )
    assert set(column(page, table, 0)) == set(names.arms)


def test_what_has_no_number_comes_last_in_either_direction(page):
    table = TABLE
    heading = page.locator(f"{table} thead th", has_text="Difference")
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
    words, line = "#differences .axis text", "#training path.line.ink"
    for theme, background in (("light", 1.0), ("dark", 0.1)):
        page.emulate_media(color_scheme=theme)
        paper = luminance(page, "body", "backgroundColor")
        assert paper == pytest.approx(background, abs=0.05)
        assert abs(luminance(page, words, "fill") - paper) > 0.4
        assert abs(luminance(page, line, "stroke") - paper) > 0.6
    page.emulate_media(color_scheme="dark", media="print")
    assert luminance(page, "body", "backgroundColor") == 1.0
    assert luminance(page, words, "fill") < 0.3


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


@pytest.mark.parametrize("width", [360, 1400])
def test_figures_can_be_read_at_any_width(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    unfold(page)
    sizes = page.eval_on_selector_all(
        "svg text", "texts => texts.map(text => parseFloat(getComputedStyle(text).fontSize))"
    )
    assert min(sizes) >= 12
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("svg text")]
            .filter(text => { const box = text.getBoundingClientRect();
                              return box.left < 0 || box.right > innerWidth; })
            .map(text => text.textContent)"""
    )
    assert beyond == []


def test_the_answer_is_seen_without_a_scroll_and_the_table_fits(page):
    page.set_viewport_size({"width": 1400, "height": 900})
    bottom = page.locator("#differences .rows").evaluate("it => it.getBoundingClientRect().bottom")
    assert bottom <= 900
    room = page.locator("#numbers > .scroll").evaluate("box => box.clientWidth - box.scrollWidth")
    assert room >= 0


def test_a_control_is_dashed_and_in_the_hue_of_its_correction(page):
    found = page.eval_on_selector_all(
        "#differences .row:has(.interval)",
        """rows => rows.slice(0, 2).map(row => {
            const line = row.querySelector(".interval");
            return [getComputedStyle(line).stroke, line.hasAttribute("stroke-dasharray")];
        })""",
    )
    (hue, dashed), (hue_of_control, control_dashed) = found
    assert hue == hue_of_control
    assert (dashed, control_dashed) == (False, True)


def test_the_legend_hides_and_shows_a_line_by_click_and_by_key(page, names):
    button = page.locator("#training .legend button", has_text=names.long)
    key = page.locator("#training .legend li", has_text=names.long).get_attribute("data-series")
    line = page.locator(f"#training .wide path.line[data-series='{key}']")
    assert line.is_visible()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not line.is_visible()
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert line.is_visible()


def test_values_are_read_off_by_pointer_and_by_key(page, names):
    box = page.locator("#training .wide .curves")
    box.scroll_into_view_if_needed()
    readout = box.locator(".readout")
    assert readout.text_content() == ""
    box.hover(position={"x": 400, "y": 60})
    shown = readout.text_content().splitlines()
    assert shown[0].endswith(" optimizer steps")
    assert len(shown) == 1 + len(names.arms)
    page.mouse.move(0, 0)
    assert readout.text_content() == ""
    scrubber = box.locator(".scrubber")
    scrubber.focus()
    page.keyboard.press("End")
    assert readout.text_content().startswith("80 optimizer steps")
    page.keyboard.press("ArrowLeft")
    assert readout.text_content().startswith("70 optimizer steps")
    assert names.script in scrubber.get_attribute("aria-valuetext")


def test_the_contents_open_what_is_folded_and_paper_shows_all_of_it(page):
    assert not page.locator("#effects .figures").is_visible()
    page.locator("nav a", has_text="Effect over training").click()
    page.wait_for_function("() => document.querySelector('#effects > details').open")
    closed = page.locator("details:not([open])").count()
    assert closed > 0
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed


def test_every_control_has_a_name_and_headings_skip_no_level(page):
    unfold(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, summary")]
            .filter(it => !(it.getAttribute("aria-label") || it.textContent).trim())
            .map(it => it.outerHTML)"""
    )
    assert nameless == []
    levels = page.eval_on_selector_all(
        "h1, h2, h3, h4", "headings => headings.map(heading => Number(heading.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_page_is_whole_without_scripts(browser, address, names):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.goto(address)
    assert tab.locator("figure").count() == FIGURES
    assert tab.locator(f"{TABLE} tbody tr").count() == len(names.arms)
    assert tab.locator("th button").count() == 0
    context.close()


def test_every_picture_has_a_name_for_those_who_do_not_see_it(page):
    unfold(page)
    told = page.locator("[role=img]").evaluate_all(
        """pictures => pictures.map(picture => picture.getAttribute("aria-labelledby").split(" ")
            .map(id => document.getElementById(id).textContent).join(" "))"""
    )
    assert len(told) == FIGURES
    assert all(len(text) > 40 for text in told)
    assert page.get_by_role("img", name="Time per step", exact=False).count() >= 1
