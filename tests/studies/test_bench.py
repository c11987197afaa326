"""The benchmark's parts run and measure what they say; no test asserts a wall-clock time."""

import threading

from rlproxi.cli import bench
from rlproxi.config.loading import build_config

TINY = {
    "data": {"size": 16},
    "model": {"channels": [32, 32]},
    "sampler": {"num_inference_steps": 3},
    "pretrain": {"candidates": [3]},
    "evaluate": {"steps": [3]},
    "rl": {"prompts_per_step": 2, "groups_per_micro_batch": 2, "group_size": 2},
    "grpo": {"trained_steps": 2},
}


def test_a_ratio_is_of_calls_of_the_same_moment(monkeypatch):
    """A machine that becomes three times as slow halfway, and one call that something else held up, change nothing."""
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds * (3 if len(calls) > 6 else 1) + 100 * (len(calls) == 9)

    assert bench.median_ratio(lambda: work("ours", 3.0), lambda: work("bare", 2.0), 5) == 1.5
    assert calls == ["ours", "bare"] * 6


def test_a_sampler_call_makes_exactly_n_forwards_of_the_benchmarked_shape():
    shapes = bench._Shapes(build_config(TINY))
    seen = []
    shapes.unet.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    shapes.sample()
    assert seen == [(4, 3, 16, 16)] * 3
    shapes.forward(3)
    assert len(seen) == 6
    assert bench.sampler_ratio(build_config(TINY), repeats=1) > 0


def test_precisions_are_compared_on_the_same_network():
    assert bench.bfloat16_speedup(build_config(TINY), repeats=1) > 0


def test_bare_work_is_one_iterations_forwards_and_backwards(monkeypatch, tmp_path):
    """Two micro-batches of two groups, three sampling steps, both actions trained; a process for each rank."""
    calls = []
    monkeypatch.setattr(bench, "_barrier", threading.Barrier(1), raising=False)
    monkeypatch.setattr(bench._Shapes, "forward", lambda self, times=1: calls.append(f"{times} forwards"))
    monkeypatch.setattr(bench._Shapes, "forward_backward", lambda self: calls.append("backward"))
    for ranks, micro_batches in ((1, 2), (2, 1)):
        config = build_config(
            {
                **TINY,
                "rl": {**TINY["rl"], "prompts_per_step": 4},
                "grpo": {**TINY["grpo"], "kl_coef": 0.1},
                "resources": {"learner_workers": ranks},
            }
        )
        calls.clear()
        seconds = bench.bare_iterations(config, bench.random_classifier(config, tmp_path), repeats=1)
        assert len(seconds) == 1 and seconds[0] > 0
        assert calls == ["5 forwards", "backward", "backward"] * micro_batches * 2
