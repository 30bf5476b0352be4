"""Ladders of runs: plan, training and state of the rungs: ``allometry ladder``."""
