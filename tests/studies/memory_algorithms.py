r"""The memory estimate of R0, DIDR and GRPO's last step against what is really allocated: figures of docs/memory.md.

    PYTHONPATH=.:tests python tests/studies/memory_algorithms.py

One update of one micro-batch of 32 images at 32x32, four steps (DIDR one), random weights, the attribute classifier as
reward; torch's profiler on the CPU. What weights, gradients and optimizers hold is not part of either figure.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fixtures.memory_learner import LORA, learner_config, real_peaks
from rlproxi.planning.memory import estimate

_MIB = 1024**2
CASES = [
    ("R0, gradient step by step", "r0", {}),
    ("R0, gradient through all steps", "r0", {"checkpoint_steps": False}),
    ("R0+", "r0", {"plus": True}),
    ("R0, guidance as a reward", "r0", {"guidance_weight": 0.5}),
    ("DI", "didr", {"reward": "none"}),
    ("DI++", "didr", {"reward": "terminal"}),
    ("DI*", "didr", {"reward": "terminal", "divergence": "score"}),
    ("DIDR, m=1, damped", "didr", {}),
    ("DIDR, m=2, 2 particles", "didr", {"damped": False, "reward_steps": 2, "particles": 2}),
    ("GRPO with the last step's gradient", "grpo", {"last_step_weight": 1.0}),
]
FORMS = [("new", "float32", None, 32), ("new", "bfloat16", None, 32), ("sd15", "bfloat16", LORA, 8)]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for kind, precision, lora, size in FORMS:
            for title, algorithm, settings in CASES:
                model = {"precision": precision, "lora": lora}
                config = learner_config(Path(root), algorithm, kind, model, size, 4, **settings)
                measured = max(real_peaks(config).values()) / _MIB
                estimated = estimate(config).roles[0].parts["activations"] / _MIB
                print(
                    f"| {title} | {kind} | {precision} | {'LoRA' if lora else 'all'} | {estimated:.2f} "
                    f"| {measured:.2f} | {estimated / measured - 1:+.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
