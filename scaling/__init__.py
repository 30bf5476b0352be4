"""What changes with size: roles, counting, parameterization, the plan of a run."""
