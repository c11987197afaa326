"""A rollout actor: a process (and its GPU) that samples groups."""

from __future__ import annotations

import numpy as np
import ray

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config

from .messages import Images


@ray.remote(max_restarts=-1, max_task_retries=0)
class RolloutActor:
    """Loads the model folder once; takes new weights when a request names a publication it does not hold.

    Weights are an argument of their own and not in a message: Ray fetches them before the call begins.
    """

    def __init__(self, config: Config, model_folder: str):
        # Not at the top of the module: the conductor imports it and needs none of these.
        import torch

        from rlproxi.algorithms.rollout import GroupSampler

        torch.set_num_threads(config.resources.threads)
        device = "cuda" if config.resources.rollout_gpus and torch.cuda.is_available() else "cpu"
        self.sampler = GroupSampler.from_pretrained(config, model_folder, device)
        self.publication: int | None = None

    def ready(self) -> bool:
        """True; an answer shows that the model is loaded."""
        return True

    @ray.method(num_returns=2)
    def sample(
        self, request: SampleRequest, publication: int, weights: np.ndarray
    ) -> tuple[Images, dict[str, np.ndarray]]:
        """Sample a request. The chain is an object of its own: only the learner fetches it.

        Both are returned, not put into the object store by this actor, so they outlive it.
        """
        self._take(publication, weights)
        images, chain = self.sampler.sample(request)
        return Images(images, chain.get("finite", np.ones(len(images), bool))), chain

    def save(self, publication: int, weights: np.ndarray, folder: str) -> None:
        """Write the model with these weights as a model folder."""
        self._take(publication, weights)
        self.sampler.pipeline.save_pretrained(folder)

    def _take(self, publication: int, weights: np.ndarray) -> None:
        if publication != self.publication:
            self.sampler.take(weights)
            self.publication = publication
