"""Comparison of the same step and run in several layouts: ``allometry verify``."""
