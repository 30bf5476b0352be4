"""Measurement of this machine for the planner: rates of its processes, alone and together."""
