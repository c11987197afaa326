"""An algorithm of one's own: reward-weighted regression (Peters and Schaal 2007) on the chain that rollouts keep.

Each action is drawn towards again, the more so the better its sample was: -sum softmax(r / T) log pi.
"""

from dataclasses import replace

import torch

from rlproxi.algorithms.base import Algorithm, Update, share
from rlproxi.models.text import operator
from rlproxi.proximal import policy


class RewardWeighted(Algorithm):
    def requests(self, iteration):
        kept = tuple(range(self.config.sampler.num_inference_steps - 1))
        return [replace(request, window=kept) for request in super().requests(iteration)]

    def updates(self, batch):
        mine = share(len(batch.requests), 1, batch.world, 0, batch.rank)
        yield Update("policy", self.lr(batch.iteration), (self._loss(batch, j) for j in mine))

    def _loss(self, batch, j):
        s, request, chain = self.config.sampler, batch.requests[j], batch.chain(j)
        text = self.parts.encoder.groups(request.prompts, request.group_size)
        prox = operator(self.parts.networks["policy"], self.parts.encoder, s.guidance_scale)
        groups = len(request.prompts)
        rewards = torch.from_numpy(batch.rewards[j * groups : (j + 1) * groups])
        weight = torch.softmax(rewards / self.settings.params["temperature"], 1).reshape(-1)
        steps = s.plan(self.config.schedule.build())
        log_prob = sum(policy.log_prob(action, prox(z, action.step.t, action.step.lam, text), action.free(z, z_next))
                       for action, z, z_next in zip(policy.actions(steps), chain["z"], chain["z_next"]))
        loss = -(weight * log_prob).sum() / log_prob.numel()
        return loss, {"loss": loss.item(), "reward/mean": float(rewards.mean())}
