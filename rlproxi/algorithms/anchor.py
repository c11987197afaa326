"""AdamW with a decay towards the weights that training started from, the regulariser of R0."""

from __future__ import annotations

import torch
from torch import Tensor


class AnchoredAdamW(torch.optim.AdamW):
    """AdamW on the loss + anchor ||theta - theta_0||^2.

    The term is added to the gradient inside the step, after clipping. theta_0 is part of the optimizer's state, so it
    is sharded, saved and restored with the moments at every ZeRO stage, where theta is a flat piece of all weights.

    While ``vetoed`` is set, a step changes nothing. So an update can be skipped at every ZeRO stage, and the engine
    goes on as usual: it counts its micro-batches, clears its gradients and gathers weights that are as before.
    """

    def __init__(self, params, anchor: float = 0.0, **options):
        super().__init__(params, **options)
        self.anchor = anchor
        self.vetoed = False

    @torch.no_grad()
    def step(self, closure=None):
        """One step, or nothing while ``vetoed`` is set; as ``torch.optim.AdamW.step``."""
        if self.vetoed:
            return None
        if self.anchor:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.add_(p - self._start(p), alpha=2 * self.anchor)
        return super().step(closure)

    def _start(self, p: Tensor) -> Tensor:
        """theta_0 of a parameter: its value at the first step."""
        state = self.state[p]
        if "start" not in state:
            if not state:  # AdamW fills in its own part only where the state is empty
                state.update(
                    step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
            state["start"] = p.detach().clone()
        return state["start"]
