"""Scaling with model size: parameter roles, counts, parameterization, and the plan of a run."""
