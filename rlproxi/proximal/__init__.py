"""Proximal diffusion: schedule, operator, samplers, matching, policy, warm start. Pure torch."""
