"""Run directories whose log, timeline, galleries and evaluations are none: readers skip, or say what is missing."""

import json
import random

import pytest

from fuzz.hunt import Reader, examples, hunted
from fuzz.spoil import spoil, spoilt_json

INPUTS = {
    "run log": 600,
    "timeline": 400,
    "live log": 600,
    "live timeline": 300,
    "gallery": 400,
    "evaluation": 300,
    "pictures": 350,
    "report": 300,
}

RECORDS = [
    {"time": 1.5, "event": "stage", "name": "rl", "status": "start"},
    {
        "time": 2.0,
        "event": "metrics",
        "stage": "rl",
        "step": 1,
        "loss": 0.5,
        "reward/mean": 0.1,
        "images_per_second": 3.0,
    },
    {"time": 3.0, "event": "metrics", "stage": "rl", "step": 2, "loss": None},
    {"time": 3.5, "event": "resume", "stage": "rl", "step": 1},
    {
        "time": 4.0,
        "event": "evaluation",
        "tag": "before",
        "stage": "rl",
        "step": 0,
        "steps": 3,
        "heldout": {"judge": {"mean": 0.1, "sem": 0.01}},
    },
    {"time": 4.0, "event": "samples", "stage": "rl", "step": 5, "file": "samples/000005.json"},
    {"time": 4.5, "event": "best", "stage": "rl", "step": 2, "heldout": 0.3},
    {"time": 5.0, "event": "stage", "name": "rl", "status": "done", "seconds": 3.5},
    {"time": 6.0, "event": "warning", "message": "careful"},
]
ITERATION = {
    "time": 2.0,
    "stage": "rl",
    "step": 1,
    "spans": [["rollout", 0, "sample", 1.0, 2.0], ["reward", "clip", "score", 2.0, 0.5]],
}
GALLERY = {
    "step": 5,
    "version": 4,
    "groups": [
        {
            "prompt": "a hat",
            "index": 0,
            "rewards": [0.1, None, 2],
            "parts": {"clip": [0.1, 0.2, 0.3]},
            "best": 2,
            "worst": 0,
            "size": [8, 8],
            "image": "samples/000005-0.png",
        }
    ],
}
EVALUATION = {
    "tag": "before",
    "iteration": 0,
    "prompts": ["x", "y"],
    "samples": 2,
    "headline_steps": 3,
    "by_steps": {"3": {"heldout": {"judge": {"mean": 0.1, "sem": 0.01}}, "train": {"clip": {"mean": 1.0, "sem": 0.1}}}},
}
SUMMARY = {
    "seconds": {"rl": 3.5, "total": 3.5},
    "reward": {"first": 0.1, "last": 0.2},
    "heldout": {"before": 0.1, "after": 0.2},
}
CONFIG = b"sampler: {num_inference_steps: 3}\nrun: {algorithm: grpo}\nrl: {steps: 9}\n"


def lines(draw: random.Random, rows) -> bytes:
    """Rows in order, repeated, some of them spoilt, the end perhaps torn."""
    chosen = [draw.choice(rows) for _ in range(draw.randrange(1, 12))] if draw.random() < 0.5 else rows
    text = b"\n".join(spoilt_json(draw, [row]) if draw.random() < 0.4 else json.dumps(row).encode() for row in chosen)
    return spoil(draw, text) if draw.random() < 0.2 else text + b"\n" * (draw.random() < 0.8)


def spread_over(run, name: str, read):
    def one(data):
        (run / name).write_bytes(data)
        return read()

    return one


def readers(folder):
    import numpy as np

    from rlproxi.telemetry import gallery, runlog, timeline
    from rlproxi.telemetry.live import files as live_files
    from rlproxi.telemetry.live.run import LiveRun
    from rlproxi.telemetry.run_reader import RunReader

    run = folder / "run"
    (run / "evaluation").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    gallery.write(run, 5, 4, [gallery.GalleryGroup("a hat", 0, images, np.arange(4.0))])
    (run / "secret.txt").write_text("secret")
    (folder / "outside.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (run / "samples" / "link.png").symlink_to(folder / "outside.png")
    (run / "evaluation" / "before.json").write_text(json.dumps(EVALUATION))
    (run / "config.yaml").write_bytes(CONFIG)
    archives = []
    for save in (np.savez, np.savez_compressed):
        save(run / "samples" / "before-N3.npz", images=images, heldout=np.arange(4, dtype=np.float32))
        archives.append((run / "samples" / "before-N3.npz").read_bytes())

    def log():
        records = runlog.read(run)
        for stage in ("rl", "pretrain"):
            runlog.last_step(records, stage)
            for key in ("loss", *runlog.keys(records, stage)[:5]):
                runlog.series(records, stage, key)
        runlog.stage_seconds(records)

    def diary():
        for row in timeline.read(run):
            spans = timeline.joined(row["spans"])
            timeline.idle_shares(spans, 0.0, 10.0, {"rollout": [0], "reward": ["clip"]})
            assert row["stage"] is not None and type(row["step"]) is int

    def live():
        one = LiveRun(run)
        one.open()
        one.advance()
        json.dumps([one.snapshot(), one.config()[0]], allow_nan=False)

    def live_diary():
        json.dumps(live_files.Timeline(run).read(), allow_nan=False)

    def shown():
        json.dumps(live_files.gallery(run, 5), allow_nan=False)
        picture = live_files.gallery_picture(run, 5, 0)
        assert b"secret" not in picture

    def judged():
        json.dumps(live_files.evaluations(run), allow_nan=False)
        live_files.evaluation_picture(run, "before", 3, 1)
        json.dumps(live_files.evaluation_scores(run, "before", 3, 1), allow_nan=False)

    def report():
        found = RunReader(run)
        _ = found.headline_steps, found.judge
        for tag in found.evaluations:
            found.score(tag, "judge")
            found.samples(tag)
        found.heldout_curve("judge")

    def any_part(draw: random.Random):
        part = draw.choice(
            ("evaluation/before.json", "summary.json", "config.yaml", "metrics.jsonl", "samples/before-N3.npz")
        )
        made = {
            "summary.json": lambda: spoilt_json(draw, [SUMMARY]),
            "config.yaml": lambda: spoil(draw, CONFIG),
            "metrics.jsonl": lambda: lines(draw, RECORDS),
            "samples/before-N3.npz": lambda: spoil(draw, draw.choice(archives), archives),
        }
        return part, made.get(part, lambda: spoilt_json(draw, [EVALUATION]))()

    def report_of(input):
        (run / "evaluation" / "before.json").write_text(json.dumps(EVALUATION))
        (run / "config.yaml").write_bytes(CONFIG)
        (run / input[0]).write_bytes(input[1])
        report()

    def with_evaluation(read):
        def one(data):
            (run / "evaluation" / "before.json").write_text(json.dumps(EVALUATION))
            (run / "samples" / "before-N3.npz").write_bytes(archives[0])
            return read(data)

        return one

    laughs = b"a0: &a0 [x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)
    )
    deep = [
        ("config.yaml", b"a: " + b"[" * 100_000),
        ("config.yaml", b"a: 2001-99-99"),
        ("config.yaml", b"{a: " * 30_000),
        ("config.yaml", laughs),
        ("config.yaml", b"sampler: &a {num_inference_steps: *a}"),
        ("config.yaml", b"sampler: {num_inference_steps: [1]}"),
        ("evaluation/before.json", b"[" * 100_000),
        ("summary.json", b'{"a":' * 100_000),
        ("evaluation/before.json", b'{"by_steps": [1], "headline_steps": "x"}'),
    ]
    there = live_files.NotThere
    return {
        "run log": Reader(lambda draw, i: lines(draw, RECORDS), spread_over(run, "metrics.jsonl", log)),
        "timeline": Reader(
            lambda draw, i: lines(draw, [ITERATION, ITERATION]), spread_over(run, "timeline.jsonl", diary)
        ),
        "live log": Reader(lambda draw, i: lines(draw, RECORDS), spread_over(run, "metrics.jsonl", live)),
        "live timeline": Reader(
            lambda draw, i: lines(draw, [ITERATION, ITERATION]), spread_over(run, "timeline.jsonl", live_diary)
        ),
        "gallery": Reader(
            examples(
                [
                    json.dumps({"groups": [{"image": name}]}).encode()
                    for name in (
                        "samples/link.png",
                        "../secret.txt",
                        "samples/../secret.txt",
                        "/etc/passwd",
                        "samples/a\0.png",
                    )
                ],
                lambda draw: spoilt_json(draw, [GALLERY]),
            ),
            spread_over(run, "samples/000005.json", shown),
            (there,),
        ),
        "evaluation": Reader(
            lambda draw, i: spoilt_json(draw, [EVALUATION]),
            with_evaluation(spread_over(run, "evaluation/before.json", judged)),
            (there,),
        ),
        "pictures": Reader(
            examples(_archives(archives[0]), lambda draw: spoil(draw, draw.choice(archives), archives)),
            with_evaluation(spread_over(run, "samples/before-N3.npz", judged)),
            (there,),
            "before-N3.npz",
        ),
        "report": Reader(examples(deep, any_part), report_of),
    }


def _archives(good: bytes) -> list[bytes]:
    """Archives that claim what they do not hold, and hold what must not be loaded."""
    import io
    import zipfile

    import numpy as np

    def npz(**members: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
        return stream.getvalue()

    def header(shape: str, descr: str = "'|u1'") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
        return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text

    pickled = io.BytesIO()
    np.save(pickled, np.array([{}] * 4, object), allow_pickle=True)
    scores = header("(4,)", "'<f4'") + bytes(16)
    return [
        npz(images=header(f"(4, {2**40}, 8, 3)"), heldout=scores),
        npz(images=header(f"({2**62}, 8, 8, 3)"), heldout=scores),
        npz(images=header("(4, 0, 8, 3)"), heldout=scores),
        npz(images=header("(4, -1, 8, 3)"), heldout=scores),
        npz(images=header("(4, True, 8, 3)"), heldout=scores),
        npz(images=header(f"({2**40}, 8, 8, 3)") + bytes(20 << 20), heldout=scores),
        npz(images=pickled.getvalue(), heldout=pickled.getvalue()),
        npz(images=header("(4, 8, 8, 3)") + bytes(768), heldout=header("(4,)", "'<U9'") + bytes(144)),
        npz(images=header("(4, 8, 8, 3)") + bytes(768), heldout=header("(4,)", "'<c8'") + bytes(32)),
        npz(images=header("(4, 8, 8, 3)") + bytes(768), heldout=header("(4,)", "'<M8[s]'") + bytes(32)),
        npz(images=header("(4, 8, 8, 3)", "[('a', '<f4')]") + bytes(3072), heldout=scores),
        npz(images=header("(" * 90 + "4" + ")" * 90), heldout=scores),
        npz(images=header("__import__('os').abort()"), heldout=scores),
        b"",
        b"PK\5\6" + bytes(18),
        good[:-30],
    ]


def test_run_directories():
    hunted("test_run_directories", INPUTS)


@pytest.mark.exhaustive
def test_more_run_directories():
    hunted("test_run_directories", {name: 20 * count for name, count in INPUTS.items()})
