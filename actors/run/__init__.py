"""One run from start to end: the driver, its supervisor, the run log."""
