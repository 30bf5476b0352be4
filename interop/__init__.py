"""Checkpoints and descriptions of other frameworks, read and written."""
