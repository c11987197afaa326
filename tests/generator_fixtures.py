"""What R0 and DIDR are tested with: a text encoder that says nothing, and a reward with a closed form."""

import torch

from rlproxi.models.text import TextStates


class Encoder:
    def groups(self, prompts, size):
        rows = len(prompts) * size
        return TextStates(torch.zeros(rows, 1, 1), torch.zeros(rows, 1), torch.ones(rows, 1))

    def null_like(self, text):
        return TextStates(text.states - 1, text.pooled - 1, text.mask)


class Quadratic:
    """r = -gain/2 mean (pixels - goal)^2, on pixels in [0, 1]."""

    def __init__(self, gain=1.0, goal=0.4):
        self.gain, self.goal = gain, goal

    def rewards(self, pixels, prompts):
        return -self.gain / 2 * (pixels - self.goal).flatten(1).square().mean(1)
