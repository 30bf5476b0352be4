"""The loop, one step, checkpoints and the record."""
