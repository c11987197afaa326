"""Reward fine-tuning of text-to-image models around proximal diffusion. The method; no Ray in here."""

__version__ = "0.1.0"
