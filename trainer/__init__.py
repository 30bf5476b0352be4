"""Training loop, training step, checkpoints and run records."""
