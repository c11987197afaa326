"""The score-based baseline on the same networks: eps-model, eps-matching, Euler-Maruyama, ODE, DDIM."""

from .matching import draw_times, matching_loss, perturb
from .model import EpsModel, ScoreModel, guided
from .samplers import SAMPLERS, sample

__all__ = ["SAMPLERS", "EpsModel", "ScoreModel", "draw_times", "guided", "matching_loss", "perturb", "sample"]
