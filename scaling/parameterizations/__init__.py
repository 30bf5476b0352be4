"""The parameterizations: a file for each, on one base."""
