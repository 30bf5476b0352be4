"""Fits of law forms to observations."""
