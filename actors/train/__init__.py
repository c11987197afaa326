"""Ray Train ranks: pre-training and the learner, their engine and checkpoints."""
