"""The stage rl: rollouts, rewards and weights around the learner."""
