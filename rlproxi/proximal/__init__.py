"""Proximal diffusion: schedule, operator, samplers, matching, policy, warm start. Pure torch."""

from .matching import TimeTable, corrupt, matching_loss
from .operator import Denoiser, Prox, ProximalOperator
from .policy import Action, actions, kl, log_ratio
from .samplers import SAMPLERS, Noise, Step, Trajectory, generator_noise, plan, sample
from .schedule import VPSchedule
from .warmstart import WarmStart

__all__ = [
    "SAMPLERS",
    "Action",
    "Denoiser",
    "Noise",
    "Prox",
    "ProximalOperator",
    "Step",
    "TimeTable",
    "Trajectory",
    "VPSchedule",
    "WarmStart",
    "actions",
    "corrupt",
    "generator_noise",
    "kl",
    "log_ratio",
    "matching_loss",
    "plan",
    "sample",
]
