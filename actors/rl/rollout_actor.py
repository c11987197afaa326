"""A rollout actor: a process (and its GPU) that samples groups."""

from __future__ import annotations

import numpy as np
import ray

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config


@ray.remote(max_restarts=-1, max_task_retries=0)
class RolloutActor:
    """Loads the model folder once; takes new weights when a request names a publication it does not hold.

    Not a version: a restarted learner publishes a version again, and its weights need not be the same to the bit.
    """

    def __init__(self, config: Config, model_folder: str):
        # Here and not above: the conductor imports this module and needs none of these.
        import torch

        from rlproxi.algorithms.rollout import GroupSampler

        torch.set_num_threads(config.resources.threads)
        device = "cuda" if config.resources.rollout_gpus and torch.cuda.is_available() else "cpu"
        self.sampler = GroupSampler.from_pretrained(config, model_folder, device)
        self.publication: int | None = None

    def ready(self) -> bool:
        return True

    @ray.method(num_returns=2)
    def sample(self, request: SampleRequest, publication: int, weights: np.ndarray):
        """(images uint8 [P*G, H, W, 3], chain). Both are *returned*, so they outlive this actor."""
        self._take(publication, weights)
        return self.sampler.sample(request)

    def save(self, publication: int, weights: np.ndarray, folder: str) -> None:
        """Writes the model with these weights as a model folder."""
        self._take(publication, weights)
        self.sampler.pipeline.save_pretrained(folder)

    def _take(self, publication: int, weights: np.ndarray) -> None:
        if publication != self.publication:
            self.sampler.take(weights)
            self.publication = publication
