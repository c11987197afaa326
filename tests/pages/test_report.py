import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rlproxi.config.loading import Config, dump_config
from rlproxi.data import faces
from rlproxi.evaluation import heldout, images
from rlproxi.pages import figures
from rlproxi.pages.report import write_report
from rlproxi.telemetry.run_reader import RunReader
from rlproxi.telemetry.runlog import RunLog

P, S, STEPS = 3, 2, (2, 6)
PICTURES, CAPTIONS, _ = faces.batch(1, np.repeat(np.arange(P), S), 16)
PROMPTS = CAPTIONS[::S]


def evaluation(run_dir, tag: str, level: float, looks: bool = False) -> None:
    """Stores an evaluation through the writer that the conductor uses; scores lie around ``level``; with
    ``looks`` the distance is level / steps and the diversity level / 2."""
    scores = np.float32([level - 0.1, level + 0.1] * P)
    details = {"judge": {"skin": np.full(P * S, level), "hand": np.full(P * S, np.nan), "all": scores}}
    result = {
        "tag": tag,
        "prompts": PROMPTS,
        "samples": S,
        "headline_steps": 6,
        "by_steps": {
            str(n): heldout.summarise(
                {"judge": scores - 0.1 * (n == 2), "attributes": scores},
                details,
                ["judge"],
                S,
                {
                    "diversity": level / 2,
                    "distance": {"total": level / n, "layout": level / n - 0.01, "texture": 0.01},
                }
                if looks
                else None,
            )
            for n in STEPS
        },
    }
    if looks:
        result["data"] = {"images": P * S, "diversity": 0.123, "distance": {"total": 0.0456}}
    heldout.write(
        run_dir, tag, result, {n: PICTURES for n in STEPS}, {n: scores for n in STEPS}, {n: {} for n in STEPS}
    )


def pretraining(run_dir) -> None:
    run_dir.mkdir(exist_ok=True)
    dump_config(Config(), run_dir / "config.yaml")
    with RunLog(run_dir) as log:
        log.append("stage", name="pretrain", status="start")
        for step in range(0, 500, 10):
            log.append("metrics", stage="pretrain", step=step, loss=1 / (1 + step), lr=1e-3, images_per_second=90.0)
        log.append("stage", name="pretrain", status="done", seconds=83.0)


def reinforcement(run_dir) -> None:
    with RunLog(run_dir) as log:
        for step in range(1, 31):
            log.append(
                "metrics",
                stage="rl",
                step=step,
                **{
                    "reward/mean": 0.5 + step / 100,
                    "reward/std": 0.1,
                    "reward/attributes": 0.5 + step / 100,
                    "kl": step * 1e-4,
                    "clip_fraction": 0.0,
                    "ratio/mean": 1.0,
                    "ratio/first_max_deviation": 2e-7,
                    "seconds/rollout": 1.0,
                    "seconds/reward": 0.25,
                    "seconds/train": 2.0,
                    "seconds/sync": 0.01,
                    "seconds/step": 3.0 if step != 7 else float("nan"),
                },
            )
            if step == 10:
                log.append("warning", message="group 'a <b>bold</b> hat' has no score")
                log.append("resume", stage="rl", step=8)


@pytest.fixture
def finished(tmp_path):
    run_dir = tmp_path / "quickstart-1"
    pretraining(run_dir)
    evaluation(run_dir, "before", 0.55)
    reinforcement(run_dir)
    evaluation(run_dir, "step-000025", 0.65)
    evaluation(run_dir, "after", 0.8)
    (run_dir / "summary.json").write_text(
        json.dumps(
            {
                "seconds": {"total": 200.0, "pretrain": 83.0, "rl": 95.0},
                "reward": {"first": 0.51, "last": 0.8},
                "heldout": {"before": 0.55, "after": 0.8},
                "images_per_second": 41.5,
                "seed": 0,
                "git": "abc123",
                "versions": {"torch": "2.13.0"},
            }
        )
    )
    return run_dir


class Page(HTMLParser):
    """Collects text, images and figures, and checks that the tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.words, self.sources, self.labels, self.stack, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *a) for a in attrs]
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        if tag == "svg":
            self.labels.append(dict(attrs)["aria-label"])
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)


def test_a_finished_run_is_reported_whole(finished):
    path = write_report(finished)
    assert path == finished / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "Not in this run directory" not in page.text
    for words in (
        "0.550 → 0.800",
        "0.51 → 0.8",
        "41.5 images/s",
        "3 min 20 s",
        "1 min 23 s",
        "abc123",
        "torch 2.13.0",
        "Finished. Held-out judge, before and after RL: 0.550 → 0.800 .",
        "clip_fraction is 0 at all 28 RL steps.",
        "ratio/mean is 1 at all 28 RL steps.",
        "step is 3 at the other 27 RL steps, and has no value at RL step 7.",
        "off 1 by at most 2e-07 in 28 checks (tolerance 1e-06)",
        "max_bytes_in_flight: 2147483648",
    ):
        assert words in page.text, words
    assert page.labels == [
        "training reward",
        "held-out judge",
        "kl",
        "held-out judge against the number of steps",
        "share judged right by judge",
        "Pre-training loss",
    ]
    assert all(prompt in page.text for prompt in PROMPTS)
    # The images on the page are the stored ones, before and after, pixel for pixel.
    assert len(page.sources) == 2 * P * S + 3 * P * S  # before and after; and three evaluations under the slider
    shown = [np.array(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1])))) for s in page.sources]
    assert np.array_equal(shown[0], PICTURES[0]) and np.array_equal(shown[S], PICTURES[0])
    assert not [p for p in finished.iterdir() if p.name.startswith(".")]


def test_the_page_needs_no_network_and_escapes_what_it_quotes(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    page = Page(text)
    assert "<b>bold</b>" not in text and "a <b>bold</b> hat" in page.text
    assert "resume: rl went on from step 8" in page.text
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action") or "url(" in (value or ""):
            own = ("data:image/png;base64,", "data:text/csv;charset=utf-8,", "#", "url(#")
            document = tag == "a" and re.fullmatch(r"(\.\./)*[\w./-]*docs/[\w-]+\.md", value)  # only a click opens it
            assert value.startswith(own) or document, (tag, name, value[:60])
    assert "@import" not in text and text.count("<script") == 1
    script = text[text.index("<script>") : text.index("</script>")]
    assert not re.search(r"fetch|http|import|XMLHttp|innerHTML", script)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_figures_are_valid_and_follow_the_page_colour(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    found = re.findall(r"<svg.*?</svg>", text, re.S)
    ids = []
    for figure in found:
        root = ElementTree.fromstring(figure)
        assert "width" not in root.attrib and "viewBox" in root.attrib and "currentColor" in figure
        ids += re.findall(r'<clipPath id="([^"]+)"', figure)
    assert len(found) == 6 and len(ids) == len(set(ids))


def test_curves_are_those_of_the_log(finished):
    run = RunReader(finished)
    assert run.judge == "judge" and run.headline_steps == 6
    steps, means, errors = run.heldout_curve("judge")
    assert steps == [0, 25, 30] and np.allclose(means, [0.55, 0.65, 0.8]) and np.allclose(errors, 0, atol=1e-6)
    assert np.allclose(run.score("after", "judge", 2), (0.7, 0), atol=1e-6)
    assert run.score("after", "attributes") is not None and run.score("after", "nobody") is None


def test_distance_and_diversity_stand_beside_the_judge(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    assert not [words for words in ("istance to data", "iversity", "real images") if words in text], "of an older run"
    assert "pectrum" not in text and "has no distance" not in text and "has no spectrum" not in text
    evaluation(finished, "before", 0.3, looks=True)
    evaluation(finished, "after", 0.6, looks=True)
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert "distance to data against the number of steps" in page.labels
    for words in (
        "Distance to data, 6 steps 0.05 → 0.1 ",
        "layout 0.04 → 0.09, texture 0.01 → 0.01",
        "; real images 0.0456",
        "Diversity, 6 steps 0.15 → 0.3 ",
        "real images 0.123",
        "steps held-out, before → after distance, before → after diversity, before → after "
        "2 0.200 ± 0.000 → 0.500 ± 0.000 0.15 → 0.3 0.15 → 0.3 6 0.300 ± 0.000 → 0.600 ± 0.000 0.05 → 0.1 0.15 → 0.3 "
        "real images - 0.0456 0.123",
    ):
        assert words in page.text, words


def test_a_distance_that_only_one_evaluation_has_is_shown_for_it(finished):
    evaluation(finished, "after", 0.6, looks=True)
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert (
        "Distance to data, 6 steps - → 0.1 " in page.text
        and "0.550 ± 0.000 → 0.600 ± 0.000 - → 0.1 - → 0.3" in page.text
    )


def test_words_the_judge_found_wrong_are_named(finished):
    names = np.array(["mouth", "hat"])
    correct = np.ones((P * S, 2), np.float32)
    correct[1, 1] = 0
    correct[2] = np.nan
    np.savez(
        finished / "samples" / "after-N6.npz",
        images=PICTURES,
        heldout=np.ones(P * S, np.float32),
        attributes=names,
        correct=correct,
    )
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    hat = faces.parse_caption(PROMPTS[0])["hat"]
    assert page.text.count("✗") == 3 and f"✗ hat ({hat})" in page.text  # legend, gallery, and slider


def test_only_pretraining(tmp_path):
    pretraining(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert page.labels == ["Pre-training loss"] and page.sources == []
    for words in (
        "summary.json is missing",
        "no evaluation 'before' (yet)",
        "No RL step",
        "No sample images",
        "no score → no score",
        "1 min 23 s",
    ):
        assert words in page.text, words


def test_a_run_in_the_middle(tmp_path):
    run_dir = tmp_path / "run"
    pretraining(run_dir)
    evaluation(run_dir, "before", 0.5)
    with RunLog(run_dir) as log:
        log.append("metrics", stage="rl", step=1, **{"reward/mean": float("nan"), "kl": 0.0})
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert len(page.sources) == P * S and "0.500 → no score" in page.text
    assert "No images of evaluation 'after'" in page.text and "No ratio check" in page.text


PARTS = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "evaluation/before.json",
    "evaluation/after.json",
    "samples/before-N6.npz",
    "samples/after-N6.npz",
)


@pytest.mark.parametrize("damage, parts", [*(("gone", [p]) for p in PARTS[:-1]), ("cut", PARTS), ("junk", PARTS)])
def test_any_part_may_be_missing_or_damaged(finished, parts, damage):
    for file in (finished / part for part in parts):
        data = file.read_bytes()
        file.unlink()
        if damage != "gone":
            file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\x00\xff[1")
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert "Before and after" in page.text and ("Not in this run directory" in page.text) == ("npz" not in parts[0])


def changed(run_dir, tag: str, change) -> None:
    """Rewrites an evaluation's file as ``change`` leaves its entry at 6 steps."""
    file = run_dir / "evaluation" / f"{tag}.json"
    values = json.loads(file.read_text())
    change(values["by_steps"]["6"])
    file.write_text(json.dumps(values))


def test_images_come_first_and_the_contents_lead_to_every_section(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    titles = re.findall(r'<section id="([^"]+)"><h2>', text)
    assert titles[:3] == ["before-and-after", "the-same-prompts-over-training", "rewards"]
    assert re.findall(r'<li><a href="#([^"]+)">', text) == titles and len(set(titles)) == len(titles)
    assert text.index("<img") < text.index("<svg") and text.index("<img") < text.index('class="card"')
    documents = re.findall(r'<a href="([^"]+\.md)">docs/([^<]+)</a>', text)
    assert documents and all((finished / target).resolve().name == name for target, name in documents)
    assert all((finished / target).is_file() for target, _ in documents)


def test_the_slider_holds_each_evaluation_of_the_same_prompts(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    page = Page(text)
    assert '<label for="moment">' in text and 'type="range" id="moment" min="0" max="2" value="2"' in text
    names = ["before RL", "RL step 25", "RL step 30, after"]
    assert json.loads(dict(a[1:] for a in page.attributes if a[0] == "input")["data-names"]) == names
    assert [int(i) for i in re.findall(r'class="frame" data-moment="(\d)"', text)] == [0, 1, 2] * P
    # Without JavaScript every evaluation is there, under its name.
    assert 'class="frame" data-moment="0" hidden' not in text and page.text.count("RL step 25") == P
    (finished / "samples" / "step-000025-N6.npz").unlink()
    (finished / "samples" / "after-N6.npz").unlink()
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert "Fewer than two evaluations have images: evaluate.every" in page.text


def test_many_evaluations_are_thinned_evenly(finished):
    for step in range(1, 30):
        evaluation(finished, f"step-{step:06d}", 0.6)
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    names = json.loads(dict(a[1:] for a in page.attributes if a[0] == "input")["data-names"])
    assert len(names) == 12 and names[0] == "before RL" and names[-1] == "RL step 30, after"
    assert "12 of 31 evaluations, evenly chosen." in page.text


def test_every_image_says_what_it_shows(finished):
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    alts = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    assert alts[0] == f"before, sample 1 of “{PROMPTS[0]}”, held-out 0.45"
    assert len(alts) == len(page.sources) and len(set(alts)) == len(alts)


def test_the_spectrum_stands_beside_reward_and_distance(finished):
    def spectrum(ratio: float):
        periods = {str(n): 1 + (ratio - 1) / n for n in range(2, 9)}
        return lambda entry: entry.update(
            spectrum={"rows": periods, "columns": dict.fromkeys(periods, 1.0), "worst": ratio}
        )

    for tag, ratio in (("before", 3.0), ("step-000025", 2.0), ("after", 1.5)):
        changed(finished, tag, spectrum(ratio))
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert "Rewards and spectrum" in page.text
    rewards = page.labels.index("held-out judge")
    assert page.labels[rewards + 1 : rewards + 3] == ["spectrum, worst period", "spectrum along rows"]
    for words in (
        "Spectrum, worst period, 6 steps 3 → 1.5 ",
        "spectrum along columns : before is 1 at all 7 periods; after is 1 at all 7 periods.",
        "period, pixels rows, before → after columns, before → after 2 2 → 1.25 1 → 1 3 1.67 → 1.17 1 → 1",
    ):
        assert words in page.text, words
    assert RunReader(finished).curve("spectrum", "worst") == ([0, 25, 30], [3.0, 2.0, 1.5])
    changed(finished, "before", lambda entry: entry.pop("spectrum"))
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert "2 - → 1.25 - → 1" in page.text


def test_damaged_spectra_are_no_error(finished):
    for found in ({}, [], {"rows": [1], "columns": {"x": 1, "2": "much"}, "worst": None}, {"worst": float("nan")}):
        changed(finished, "after", lambda entry, found=found: entry.update(spectrum=found))
        page = Page(write_report(finished).read_text(encoding="utf-8"))
        assert "Evaluation 'after' has no spectrum." in page.text and "spectrum along" not in page.text


def test_every_curve_can_be_saved_as_csv(finished):
    text = write_report(finished).read_text(encoding="utf-8")
    links = re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]+)" aria-label="([^"]+)"', text)
    files = {name: list(csv.reader(io.StringIO(unquote(data)))) for name, data, _ in links}
    assert len(files) == len(links) == text.count("<svg") + text.count('class="steady"')
    assert {label for *_, label in links} >= {"Download kl as CSV", "Download held-out judge as CSV"}
    assert files["kl.csv"][0] == ["RL step", "kl"] and float(files["kl.csv"][5][1]) == pytest.approx(5e-4)
    assert files["held-out-judge.csv"][0] == ["RL step", "judge", "judge standard error"]
    assert [row[0] for row in files["held-out-judge.csv"][1:]] == ["0", "25", "30"]
    roles = files["seconds-of-each-role.csv"]
    assert roles[0] == ["RL step", "rollout", "reward", "train", "sync", "step"] and roles[7] == [
        "7",
        *roles[6][1:5],
        "",
    ]
    assert files["accuracy-by-attribute.csv"][0] == ["attribute", "before", "after"]


def test_a_plot_in_which_nothing_changes_is_a_sentence():
    assert figures.unchanging([1.0, 1.0 + 1e-8, math.nan]) and figures.unchanging([math.nan]) and figures.unchanging([])
    assert not figures.unchanging([0.0, 1e-9]) and not figures.unchanging([1e-6, 2e-6])


def test_a_missing_score_is_said_with_its_reason(finished):
    with RunLog(finished) as log:
        log.append("warning", message="evaluation: 'a <b>face</b>' has no score: the judge answered 503")
        log.append("evaluation", stage="rl", tag="after", step=30, steps=6)
        log.append("warning", message="2 of 16 samples are NaN")
        log.append("metrics", stage="rl", step=31, **{"reward/mean": None})
    missing = {"mean": None, "sem": None, "missing": P * S}
    changed(finished, "after", lambda entry: entry["heldout"].update(judge=missing))
    changed(finished, "before", lambda entry: entry["train"]["attributes"].update(missing=1))
    reason = {"mean": None, "skipped": "the scorer is not asked before step 50"}
    changed(finished, "step-000025", lambda entry: entry["heldout"].update(judge=reason))
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    for words in (
        "Evaluation 'after' has no score of judge: 'a <b>face</b>' has no score: the judge answered 503.",
        "Evaluation 'before': 1 samples have no score of attributes.",
        "Evaluation 'step-000025' has no score of judge: the scorer is not asked before step 50.",
        "No training reward at RL step 31: 2 of 16 samples are NaN.",
    ):
        assert words in page.text, words


def test_the_report_that_a_run_writes_at_its_end_calls_it_finished(finished):
    with RunLog(finished) as log:
        log.append("stage", name="report", status="start")  # the report is written within its stage
    assert "Finished." in Page(write_report(finished).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("resumed", [False, True])
def test_no_page_says_live_and_only_a_finished_run_is_called_finished(finished, resumed):
    if resumed:
        with RunLog(finished) as log:
            log.append("stage", name="rl", status="start")
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert not re.search(r"\blive\b", page.text)
    assert ("Finished." in page.text) != resumed
    assert ("Not finished when this page was written. The last record is of the stage rl" in page.text) == resumed


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run directory: it holds none of config.yaml"):
        write_report(tmp_path)


def test_grid_places_images_row_by_row(tmp_path):
    sheet = np.array(images.grid(PICTURES[:5], columns=2, scale=3))
    assert sheet.shape == (3 * 48 + 2 * 4, 2 * 48 + 4, 3)
    assert np.array_equal(sheet[:48:3, :48:3], PICTURES[0]) and np.array_equal(sheet[52:100:3, 52::3], PICTURES[3])
    assert (sheet[104:, 52:] == 255).all()
    path = images.save_png(PICTURES[0], tmp_path / "a" / "b.png")
    assert np.array_equal(np.array(Image.open(path)), PICTURES[0])
    with pytest.raises(ValueError, match="must end in .png"):
        images.save_png(PICTURES[0], tmp_path / "b.jpg")
    for wrong in (PICTURES.astype(np.float32), PICTURES[0], PICTURES[:0]):
        with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\]"):
            images.grid(wrong)
