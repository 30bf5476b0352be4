"""Import and export of checkpoints and configurations of other frameworks."""
