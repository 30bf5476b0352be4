"""Optimizer states in host memory and files: placement and transfers."""
