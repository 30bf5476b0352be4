"""Parameterizations, one file each, with a common base."""
