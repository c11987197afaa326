"""The live page of a finished run, in a real browser."""

import threading

import pytest

from fixtures.browser import CUT, WIDTH, browser  # noqa: F401  (a fixture)
from fixtures.dashboard_run import make_finished
from rlproxi.dashboard.process import address, bind
from rlproxi.dashboard.server import serve
from rlproxi.telemetry.live.hub import Hub
from rlproxi.telemetry.runlog import RunLog


@pytest.fixture
def run(tmp_path):
    """(run directory, URL of its live page): a finished run."""
    folder, listener, ended = make_finished(tmp_path / "a-finished-run"), bind("127.0.0.1", 0), threading.Event()
    server = threading.Thread(target=serve, args=(Hub([folder]), listener, "127.0.0.1", ended.wait), daemon=True)
    server.start()
    yield folder, address(listener)
    ended.set()
    server.join(30)


@pytest.fixture
def page(browser, run):  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    faults = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(run[1])
    page.wait_for_selector("#evaluations-body [data-tag] canvas[data-drawn]")
    yield page
    page.close()
    assert faults == []


def word(page, expected: str) -> None:
    page.wait_for_function("(text) => document.getElementById('connection').textContent === text", arg=expected)


def test_a_finished_run_never_shows_live(page, run):
    page.evaluate("""() => { window.words = [];
        new MutationObserver(() => words.push(document.getElementById('connection').textContent)).observe(
            document.getElementById('connection'), { childList: true, characterData: true, subtree: true }); }""")
    word(page, "finished")
    assert page.locator("#connection.live").count() == 0 and "finished" in page.inner_text("#cards").lower()
    page.wait_for_timeout(1500)
    assert "live" not in page.evaluate("words")
    with RunLog(run[0]) as log:  # it is resumed
        log.append("stage", name="rl", status="start")
    word(page, "live")
    with RunLog(run[0]) as log:
        log.append("stage", name="rl", status="done", seconds=1.0)
    word(page, "finished")


def test_images_come_first_side_by_side_and_it_fits(page):
    order = page.evaluate("[...document.querySelectorAll('main section[id]')].map((section) => section.id)")
    assert order[:4] == ["status", "evaluations", "controls", "rewards"]
    page.wait_for_selector(".pairs .side canvas[data-drawn]")
    sides = "[...document.querySelectorAll('.pairs .side')].slice(0, 2)"
    assert page.evaluate(f"{sides}.map((side) => side.querySelector('p').innerText)") == ["before", "after"]
    titles = page.locator("#rewards h3").all_inner_texts()[:4]
    wanted = ("reward/mean", "held-out judge", "distance/total", "spectrum/worst")
    assert [title.startswith(start) for title, start in zip(titles, wanted, strict=True)] == [True] * 4, titles
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate(WIDTH) <= width and page.evaluate(CUT) == []
        assert page.evaluate(f"new Set({sides}.map((side) => side.offsetTop)).size") == 1


def test_flat_lines_are_a_sentence_until_something_changes(page, run):
    chart = page.locator('[data-metric="rl clip_fraction"]')
    chart.scroll_into_view_if_needed()
    chart.locator(".steady", has_text="Always 0 %, from step 1 to 4.").wait_for()
    assert not chart.locator("canvas").is_visible()
    with RunLog(run[0]) as log:
        log.append("metrics", stage="rl", step=5, clip_fraction=0.5)
    chart.locator("canvas").wait_for(state="visible")
    assert not chart.locator(".steady").is_visible()


def test_a_curve_is_saved_and_a_missing_score_is_said(page, run):
    with page.expect_download() as waiting:
        page.get_by_label("Download reward/mean as CSV").click()
    lines = waiting.value.path().read_text().splitlines()
    assert waiting.value.suggested_filename == "reward-mean.csv" and lines[0].startswith("first step,last step,curve")
    assert lines[3].startswith("3,3,") and lines[3].endswith(",,,,") and ",0.9," in lines[4]
    with RunLog(run[0]) as log:
        log.append("warning", message="group 'a' has no score: the server is away")
        log.append("metrics", stage="rl", step=5, **{"reward/mean": None})
    page.locator("#cards .card.bad", has_text="no score").wait_for()
    assert "group 'a' has no score: the server is away" in page.inner_text("#cards")


def test_documents_are_linked(page):
    link = page.locator("#documents a", has_text="docs/dashboard.md")
    answer = page.request.get(page.url.split("?")[0] + link.get_attribute("href"))
    assert answer.status == 200 and answer.text().startswith("# The live page")
