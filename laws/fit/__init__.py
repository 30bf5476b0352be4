"""Fitting law forms to observations."""
