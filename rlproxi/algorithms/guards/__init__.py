"""What watches a run of any algorithm: updates, rewards, evaluations and the sampler."""
