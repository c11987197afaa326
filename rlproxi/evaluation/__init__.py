"""Measuring only: held-out scores, diversity, distances to data, and models compared by number of steps."""
