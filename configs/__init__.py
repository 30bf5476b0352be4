"""The typed description of a run and the strict loader for it."""
