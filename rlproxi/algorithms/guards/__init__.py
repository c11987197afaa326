"""Guards that watch a run of any algorithm: its updates, rewards, evaluations and sampler."""
