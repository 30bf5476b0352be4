"""Optimizer states in the host's memory and in files: who lives where, and how they travel."""
