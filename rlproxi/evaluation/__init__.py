"""Evaluation of models: held-out scores, diversity, distance to data, and reward against the number of steps."""
