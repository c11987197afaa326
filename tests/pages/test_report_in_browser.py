"""The report as a file in a real browser: it fits, it is operated by keyboard, and it fetches nothing."""

import pytest

from fixtures.browser import CUT, WIDTH, browser  # noqa: F401  (a fixture)
from fixtures.dashboard_run import make_finished
from rlproxi.pages.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(make_finished(tmp_path_factory.mktemp("runs") / "a-finished-run"))


@pytest.fixture
def page(browser, report):  # noqa: F811
    """The report in a window of 1280 pixels; afterwards nothing was fetched and nothing has failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    faults, fetched = [], []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert faults == [] and [url for url in fetched if not url.startswith("data:")] == [report.as_uri()]
    page.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
    assert page.evaluate(WIDTH) <= width
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.querySelector('img').getBoundingClientRect().width") > 60
    tops = page.evaluate("[...document.querySelectorAll('.pair .side')].slice(0, 2).map((side) => side.offsetTop)")
    assert tops[0] == tops[1], "before and after do not stand side by side"


def test_the_slider_is_moved_by_keyboard(page):
    slider = page.locator("#moment")
    seen = "[...document.querySelectorAll('.frame')].filter((f) => f.checkVisibility()).map((f) => f.dataset.moment)"
    assert page.evaluate(seen) == ["2", "2"] and page.inner_text("#moment-name") == "RL step 4, after"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(seen) == ["1", "1"] and slider.get_attribute("aria-valuetext") == "RL step 2"
    page.keyboard.press("Home")
    assert page.evaluate(seen) == ["0", "0"] and page.inner_text("#moment-name") == "before RL"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_a_curve_is_saved_from_the_file(page):
    with page.expect_download() as waiting:
        page.get_by_label("Download kl as CSV").click()
    assert waiting.value.suggested_filename == "kl.csv"
    head, *rows = [line.split(",") for line in waiting.value.path().read_text().splitlines()]
    assert head == ["RL step", "kl"] and [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row[1]) for row in rows] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])


def test_without_javascript_every_evaluation_is_shown(browser, report):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".frame:visible").count() == 6 and page.get_by_text("RL step 2", exact=True).count() == 2
    assert not page.locator("#moment").is_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, scheme):
    """Every text has a contrast of 4.5 or more with the page or its card (WCAG 2, level AA)."""
    page.emulate_media(color_scheme=scheme)
    low = page.evaluate("""() => {
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = (colour) => { const [r, g, b] = numbers(colour).map((v) => v / 255).map((v) =>
            v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = (node) => { for (let n = node; n; n = n.parentElement) {
            const found = getComputedStyle(n).backgroundColor; if (numbers(found)[3] !== 0) return found; } };
        return [...document.querySelectorAll('h1, h2, h3, p, a, b, td, th, li, figcaption, summary, label, output')]
            .filter((node) => node.checkVisibility() && node.innerText.trim()).map((node) => {
                const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 100)]; })
            .filter(([ratio]) => ratio < 4.5); }""")
    assert low == []
