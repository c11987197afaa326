"""The live page in a real browser, beside a run that goes on."""

import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from fixtures.browser import browser  # noqa: F401  (a fixture)
from fixtures.run_processes import kill_when, launch
from rlproxi.telemetry.runlog import read

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]  # minutes of a browser beside a run

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
#: Some thirty seconds of RL: what is done in the browser takes a part of them.
STEPS = 30
#: Long enough for the run's slowest stage on a busy machine.
PATIENCE = 600_000


@pytest.fixture
def run(tmp_path):
    """(process, its lines so far, run directory's parent): a smoke run with a gallery after each iteration."""
    process = launch(
        [
            str(SMOKE),
            f"run.dir={tmp_path}",
            "telemetry.dashboard_port=0",
            "telemetry.samples_every=1",
            f"rl.steps={STEPS}",
            "evaluate.every=10",
            "evaluate.steps=[2, 4]",
        ]
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    process.reader = reader
    yield process, lines, tmp_path
    if process.poll() is None:
        kill_when(process, lambda: True)


def address(process, lines) -> str:
    end = time.time() + PATIENCE / 1000
    while not (found := [line for line in lines if line.startswith("dashboard ")]):
        assert process.poll() is None and time.time() < end, "".join(lines)[-3000:]
        time.sleep(0.1)
    return found[0].split()[1]


def reach(page, chart: str, step: int) -> int:
    """Waits until a chart shows ``step`` or a later one; returns the last one that it shows."""
    canvas = f'.chart[data-metric="{chart}"] canvas'  # hidden while nothing changes
    page.wait_for_selector(canvas, timeout=PATIENCE, state="attached")
    page.locator(f'.chart[data-metric="{chart}"]').scroll_into_view_if_needed()
    page.wait_for_function(
        "([at, step]) => Number(document.querySelector(at).dataset.last) >= step", arg=[canvas, step], timeout=PATIENCE
    )
    return int(page.locator(canvas).get_attribute("data-last"))


def test_a_browser_follows_a_run(run, browser):  # noqa: F811
    process, lines, base = run
    url = address(process, lines)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    faults, hosts = [], set()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
    page.goto(url)
    page.wait_for_selector("#connection.live", timeout=60_000)
    page.evaluate("window.notReloaded = true")

    # Curves grow, of pre-training and then of RL, which was not there when the page was opened.
    reach(page, "pretrain loss", 1)
    first = reach(page, "rl reward/mean", 1)
    assert reach(page, "rl reward/mean", first + 2) > first
    reach(page, "headline heldout/judge", 0)
    cards = page.locator("#cards").inner_text()
    assert re.search(r"Stage\s+rl", cards) and f"of {STEPS}" in cards and "Training reward" in cards

    newest_samples(page)
    the_timeline_has_its_lanes(page)
    page.wait_for_selector("#evaluations-body [data-tag] canvas[data-drawn]", timeout=PATIENCE)
    operable_by_keyboard(page)
    fits_a_phone(page)

    assert page.evaluate("window.notReloaded") is True
    assert faults == [] and hosts == {urllib.parse.urlsplit(url).netloc}
    context.close()

    assert process.wait(PATIENCE / 1000) == 0
    process.reader.join(10)
    assert sum(line.startswith("dashboard ") for line in lines) == 1
    (folder,) = base.iterdir()
    assert [r["step"] for r in read(folder) if r["event"] == "samples"][-1] == STEPS
    with pytest.raises(urllib.error.URLError):  # it ended with the run
        urllib.request.urlopen(url, timeout=10)


def newest_samples(page) -> None:
    """The gallery moves on by itself, to the iteration that the log names last, and its pictures hold something."""
    body = "#gallery-body [data-step]"
    page.locator("#gallery-title").scroll_into_view_if_needed()
    page.wait_for_selector(f"{body} canvas[data-drawn]", timeout=PATIENCE)
    seen = int(page.locator(body).get_attribute("data-step"))
    if seen < STEPS:
        page.wait_for_function(
            "([at, step]) => Number(document.querySelector(at).dataset.step) > step", arg=[body, seen], timeout=PATIENCE
        )
    words = page.locator(body).inner_text()
    assert "best" in words and "worst" in words
    page.wait_for_function(
        """(at) => { const c = document.querySelector(at);
        return c && new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 8; }""",
        arg=f"{body} canvas[data-drawn]",
    )


def the_timeline_has_its_lanes(page) -> None:
    page.wait_for_function(
        "() => Number(document.querySelector('#timeline canvas').dataset.lanes) >= 3", timeout=PATIENCE
    )
    lanes = page.locator("#timeline tbody th").all_inner_texts()
    assert {lane.split()[0] for lane in lanes} >= {"rollout", "reward", "learner"}


def operable_by_keyboard(page) -> None:
    """From the top of the page with Tab alone: to a curve, its values, its scale; each stop is seen and has a name."""
    page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
    about = """() => { const node = document.activeElement, style = getComputedStyle(node);
        return {tag: node.tagName, role: node.getAttribute('role'), now: node.getAttribute('aria-valuenow'),
                text: node.getAttribute('aria-valuetext'), pressed: node.getAttribute('aria-pressed'),
                seen: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
                chart: node.closest('.chart')?.dataset.metric,
                name: node.getAttribute('aria-label') || node.innerText || node.labels?.[0]?.innerText || ''}; }"""
    stops = []
    while not stops or stops[-1]["chart"] != "rl reward/mean" or stops[-1]["role"] != "slider":
        page.keyboard.press("Tab")
        stops.append(page.evaluate(about))
        assert len(stops) < 80, stops[-3:]
    assert all(stop["seen"] and stop["name"].strip() for stop in stops if stop["tag"] != "BODY"), stops
    page.keyboard.press("Home")
    page.wait_for_function("() => document.activeElement.getAttribute('aria-valuenow') === '1'")
    assert page.evaluate(about)["text"].startswith("step 1:")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.getAttribute('aria-valuenow') === '2'")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(about)["pressed"] == "false"
    page.keyboard.press("Enter")
    assert page.evaluate(about)["pressed"] == "true"
    page.keyboard.press("Enter")


def fits_a_phone(page) -> None:
    page.set_viewport_size({"width": 360, "height": 780})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    outside = page.evaluate("""() => [...document.querySelectorAll('button, select, input, canvas')].filter((node) =>
        node.checkVisibility() && (node.getBoundingClientRect().right > 360 || node.getBoundingClientRect().left < 0))
        .map((node) => node.outerHTML.slice(0, 100))""")
    assert outside == []
    page.set_viewport_size({"width": 1280, "height": 900})
